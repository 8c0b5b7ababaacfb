"""How fast a compressed model reads and writes text, beside llama.cpp (extra ``llamacpp``) and full precision:

    python -m experiments.benchmarks.decoding full_folder compressed_folder ...

Everything takes turns in one process on one thread: each compressed model by the native pass and by its modules, the
full model by its modules in float32, and llama.cpp's types, quantized from the full model as llama.cpp does by itself.
Times are CPU time of that thread, which other work on the machine does not add to: medians of rounds, and the ratio to
the first compressed model with its 95 % interval, above 1 where that one is faster.  ``decode``: a token after a
context; ``prefill``: a prompt, of whose tokens only the last has logits.  ``products`` is the share of a decoded token
that its products take when they are called one by one, in turns with tokens of that model alone.  KL is that to the
full model, on windows of the embedded text.
"""

import argparse
import dataclasses
import datetime
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from nashswarm.data import corpus
from nashswarm.errors import require
from nashswarm.kernels import native, trellis_native
from nashswarm.measures import timing
from nashswarm.measures.size import resident_bytes
from nashswarm.methods.peers import llama_cpp as peer
from nashswarm.models import gguf_file
from nashswarm.packed.matrix import TrellisMatrix
from nashswarm.packed.modules import QuantizedLinear
from nashswarm.packed.native_forward import by_modules, natively
from nashswarm.progress import show_progress
from nashswarm.records import files
from nashswarm.records.provenance import provenance
from nashswarm.records.statistics import median_interval

OUT = pathlib.Path("results/benchmarks/decoding")
TYPES = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q8_0")
PHASES = ("decode", "prefill")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model in a runtime.

    ``read``: computes tokens after those of the last call, or from the start, and returns the last one's logits;
    ``every``: the logits of all tokens of a text.
    """

    read: Callable[[list[int], bool], Float[Tensor, " vocabulary"]]
    every: Callable[[list[int]], Float[Tensor, "tokens vocabulary"]]
    memory: int


def main() -> None:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("full", type=pathlib.Path, help="folder of the full model")
    parser.add_argument("compressed", type=pathlib.Path, nargs="+", help="folders of compressed models")
    parser.add_argument("--types", nargs="*", default=TYPES, choices=sorted(peer.TYPES))
    parser.add_argument("--context", type=int, default=64, help="tokens before the decoded ones")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--windows", type=int, default=4, help="of so many tokens, for the KL")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    if options.types:
        require("--types", ["gguf", "llama-cpp-python"], "llamacpp")
    started = datetime.datetime.now(datetime.UTC)
    torch.set_num_threads(1)
    full, *models = (load(folder) for folder in (options.full, *options.compressed))
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.full)
    text = corpus.cut_windows(corpus.StdlibDocs().text("test"), tokenizer, options.prompt, "test")
    contestants: dict[str, Contestant] = {}
    for folder, model in zip(options.compressed, models, strict=True):
        contestants[folder.name] = of_transformers(model, natively)
        contestants[f"{folder.name}, modules"] = of_transformers(model, by_modules)
    contestants["float32, modules"] = of_transformers(full, by_modules)
    with tempfile.TemporaryDirectory() as folder:
        whole = pathlib.Path(folder) / "full.gguf"
        if options.types:
            gguf_file.write(full, whole, "float32")
        for kind in options.types:
            file = whole.with_name(f"{kind}.gguf")
            peer.quantize_file(whole, file, kind, {}, {})
            contestants[f"llama.cpp {kind}"] = of_llama_cpp(file, full.config.vocab_size, options)
        windows = text[: options.windows].tolist()
        turns = {name: functools.partial(seconds, each, windows[0], options) for name, each in contestants.items()}
        times = timing.interleaved(turns, options.rounds, 2, show_progress)
        kl = divergences(contestants, windows)
    rows = table_rows(times, kl, {name: each.memory for name, each in contestants.items()})
    for row, folder, model in zip(rows[::2], options.compressed, models, strict=False):
        row["products"] = product_share(natively(model), contestants[folder.name], windows[0], options)
    content = {"path": native.path(), "rows": rows, "provenance": provenance(started)}
    note = f"Ours: {native.path()}."
    if options.types:
        content["llama.cpp"] = features()
        note += f"  llama.cpp: {features()}."
    table = f"{as_table(rows)}\n{note}\n"
    files.write_report(options.out, content, table)
    print(table)


def load(folder: pathlib.Path) -> Any:
    """Load a model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def of_transformers(model: Any, prepare: Callable[[Any], Any]) -> Contestant:
    """Compute by the modules or by the native pass, as ``prepare`` says."""
    state: dict[str, Any] = {}

    @torch.no_grad()
    def read(ids: list[int], anew: bool) -> Tensor:
        past = None if anew else state["output"].past_key_values
        output = prepare(model)(torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1)
        state["output"] = output
        last: Tensor = output.logits[0, -1]
        return last

    @torch.no_grad()
    def every(ids: list[int]) -> Tensor:
        logits: Tensor = prepare(model)(torch.tensor([ids])).logits[0]
        return logits

    return Contestant(read, every, resident_bytes(model))


def of_llama_cpp(file: pathlib.Path, vocabulary: int, options: argparse.Namespace) -> Contestant:
    """Compute by llama.cpp on one thread."""
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
    sizes = llama_cpp.llama_context_default_params()
    sizes.n_ctx = max(options.prompt, options.context + options.new_tokens)
    sizes.n_batch = sizes.n_ubatch = options.prompt
    sizes.n_threads = sizes.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, sizes)
    memory = llama_cpp.llama_get_memory(context)

    def compute(ids: list[int], anew: bool, logits: bool) -> None:
        start = 0 if anew else llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1
        if anew:
            llama_cpp.llama_memory_clear(memory, True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = logits or place == len(ids) - 1
        failed = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp could not compute {len(ids)} tokens: code {failed}")

    def logits_at(place: int) -> Tensor:
        pointer = llama_cpp.llama_get_logits_ith(context, place)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (vocabulary,)).copy())

    def read(ids: list[int], anew: bool) -> Tensor:
        compute(ids, anew, False)
        return logits_at(-1)

    def every(ids: list[int]) -> Tensor:
        compute(ids, True, True)
        return torch.stack([logits_at(place) for place in range(len(ids))])

    return Contestant(read, every, file.stat().st_size)


def features() -> str:
    """Return the instruction sets that llama.cpp was built for and found."""
    import llama_cpp

    words = llama_cpp.llama_print_system_info().decode().replace("CPU :", "").split("|")
    return ", ".join(word.split("=")[0].strip() for word in words if word.strip().endswith("= 1"))


def seconds(contestant: Contestant, window: list[int], options: argparse.Namespace) -> tuple[float, float]:
    """Return the CPU seconds of a decoded token and of reading the prompt."""
    logits = contestant.read(window[: options.context], True)
    started = time.thread_time()
    for _ in range(options.new_tokens):
        logits = contestant.read([int(logits.argmax())], False)
    decoded = (time.thread_time() - started) / options.new_tokens
    started = time.thread_time()
    contestant.read(window, True)
    return decoded, time.thread_time() - started


def divergences(contestants: Mapping[str, Contestant], windows: list[list[int]]) -> dict[str, float]:
    """Return the mean KL of every contestant to the full model, in nats per token."""
    sums = dict.fromkeys(contestants, 0.0)
    for window in windows:
        exact = contestants["float32, modules"].every(window).log_softmax(-1)
        for name, contestant in contestants.items():
            own = contestant.every(window).log_softmax(-1)
            sums[name] += float((exact.exp() * (exact - own)).sum(-1).mean()) / len(windows)
    return sums


def product_share(model: Any, contestant: Contestant, window: list[int], options: argparse.Namespace) -> float:
    """Return the share of a decoded token that its products take one by one, without the time of the calls."""
    multiply = trellis_native.library_with_tables().nashswarm_trellis_matmul
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    held, calls = [], []
    for linear in linears:
        matrix = linear.matrix
        assert isinstance(matrix, TrellisMatrix)
        x, y = torch.randn(matrix.shape[1]), torch.empty(matrix.shape[0])
        held.append((x, y))
        tiles, digits = matrix.tiles, native.DIGITS[linear.activations]
        addresses = tiles.content.data_ptr(), tiles.starts.data_ptr(), x.data_ptr(), None, y.data_ptr()
        calls.append((addresses, (digits, 1, native.PATHS[native.path()])))

    def once(batch: int) -> float:
        started = time.thread_time()
        for addresses, rest in calls:
            multiply(*addresses, batch, *rest)
        return time.thread_time() - started

    shares = []
    for _ in range(options.rounds):
        products = statistics.median(once(1) - once(0) for _ in range(options.new_tokens))
        shares.append(products / seconds(contestant, window, options)[0])
    return statistics.median(shares)


def table_rows(
    times: Mapping[str, list[tuple[float, float]]], kl: Mapping[str, float], memory: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return a row for every contestant."""
    first = next(iter(times.values()))
    rows = []
    for name, by_round in times.items():
        row: dict[str, Any] = {"model": name, "MB": 1e-6 * memory[name], "KL": kl[name]}
        for place, phase in enumerate(PHASES):
            row[f"{phase} ms"] = 1000 * statistics.median(own[place] for own in by_round)
            ratios = [own[place] / mine[place] for own, mine in zip(by_round, first, strict=True)]
            low, high = median_interval(ratios)
            row |= {f"{phase} ratio": statistics.median(ratios), f"{phase} low": low, f"{phase} high": high}
        rows.append(row | {"products": None})
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    cells = [[f"{part:.3g}" if isinstance(part, float) else str(part or "") for part in row.values()] for row in rows]
    lines = [list(rows[0]), [":--", *["--:"] * (len(rows[0]) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
