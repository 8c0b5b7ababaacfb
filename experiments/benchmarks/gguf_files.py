"""What do GGUF files whose tensors chose their types lose, by llama.cpp's own tool, beside its stock mixes?

    python -m experiments.benchmarks.gguf_files folder --calibration text.txt --test text.txt --tool llama-perplexity

For each folder of a model and each stock mix, with and without an importance matrix of the calibration windows, and for
a file of ours of at most the same bytes: the KL to the full model by ``llama-perplexity --kl-divergence``, and of the
weights that the file decodes to by torch, on the same tokens.  The tool reads windows of text and counts the second
half of each.  Greedy text that llama.cpp writes with our file is compared with that of torch and the decoded weights:
llama.cpp rounds the inputs of products with packed types to 8 bits, with the same weights in 32 bits it does not.  The
types that tensors choose among by default leave out Q4_1, which could hold a model dequantized from it as it is.
Extra ``llamacpp``.
"""

import argparse
import datetime
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from nashswarm.errors import require
from nashswarm.experiment import compression, plan, texts, typed_export
from nashswarm.measures.size import Size
from nashswarm.methods.gguf_types.settings import GgufTypes
from nashswarm.methods.peers import llama_cpp as peer
from nashswarm.models import gguf_architectures, gguf_file, matrices, sources
from nashswarm.progress import show_progress
from nashswarm.records import files
from nashswarm.records.provenance import provenance

OUT = pathlib.Path("results/benchmarks/gguf_files")
STOCK = ("Q2_K", "Q3_K_M", "Q4_K_M")
TYPES = ("Q3_K", "IQ4_XS", "Q4_0", "IQ4_NL", "Q5_0", "Q6_K", "Q8_0")
PRINTED = {  # by the tool → its column here, and its scale
    r"Mean\s+KLD:\s+([-\d.]+)": ("KL of the tool", 1.0),
    r"Mean\s+KLD:\s+[-\d.]+ ±\s+([\d.]+)": ("±", 1.0),
    r"Same top p:\s+([\d.]+)": ("top-1 %", 1.0),
}
PROMPT = 16  # tokens that greedy text goes on from


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=pathlib.Path, nargs="+", help="of models in Hugging Face layout")
    parser.add_argument("--calibration", type=pathlib.Path, required=True, help="a text file")
    parser.add_argument("--test", type=pathlib.Path, required=True, help="another text file")
    parser.add_argument("--tool", type=pathlib.Path, required=True, help="llama-perplexity of llama.cpp")
    parser.add_argument("--stock", nargs="+", default=list(STOCK), choices=sorted(peer.TYPES), help="mixes to compare")
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="that our tensors choose among")
    parser.add_argument("--windows", type=int, default=40, help="of calibration text")
    parser.add_argument("--test-windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--greedy", type=int, nargs=2, default=(8, 32), help="texts, and tokens of each")
    parser.add_argument("--cache", type=pathlib.Path, help="of statistics; default: none is kept")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args(arguments)
    require("gguf_files", ["gguf", "llama-cpp-python"], "llamacpp")
    started = datetime.datetime.now(datetime.UTC)
    rows: list[dict[str, Any]] = []
    try:
        for folder in options.folders:
            with tempfile.TemporaryDirectory() as place:
                rows += measure(folder, options, pathlib.Path(place))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    numbers = {name: getattr(options, name) for name in ("types", "windows", "test_windows", "length", "greedy")}
    files.write_report(options.out, {"rows": rows} | numbers | {"provenance": provenance(started)}, table(rows))
    print(table(rows))
    return 0


def measure(folder: pathlib.Path, options: argparse.Namespace, place: pathlib.Path) -> list[dict[str, Any]]:
    """Return one row a file of the model in ``folder``: what it is, its bytes and its KL.  Files go to ``place``."""
    config = configuration(folder, options, options.cache or place / "cache")
    loaded = compression.load(config, plan.plan(config))
    full, tokenizer, layout = loaded.session.full, loaded.tokenizer, gguf_architectures.layout(loaded.session.full)
    names = {layer.name: layout.names[f"{layer.name}.weight"] for layer in loaded.session.layers}
    moments = loaded.session.context().moments()
    importance = {names[layer.name]: peer.column_importance(layer, moments) for layer in loaded.session.layers}
    whole = place / "full.gguf"
    gguf_file.write(full, whole, "float32", tokenizer)
    run_tool(options, whole, place / "logits", write=True)
    windows = test_windows(options.test.read_text(encoding="utf-8"), tokenizer, options)
    expected = [log_probabilities(full, window) for window in windows]
    rows = []
    for kind in show_progress(options.stock, "stock mixes"):
        sizes = {}
        for name, weights in ((kind, {}), (f"{kind}, imatrix", importance)):
            path = place / "small.gguf"
            peer.quantize_file(whole, path, kind, weights, {})
            sizes[name] = path.stat().st_size
            rows.append(row(name, path, decoded(path, full), expected, windows, options))
        asked, path = min(sizes.values()), place / "ours.gguf"
        made = typed_export.compress(config, path, asked, None)
        model = decoded(path, full)
        rows.append(row(f"ours for {kind}", path, model, expected, windows, options))
        rows[-1] |= {"of the bytes asked": path.stat().st_size / asked, "tensors": made["tensors"]}
        rows[-1]["regret"] = made["regret_sum"] / made["damage"]
        rows[-1]["greedy texts alike"] = greedy_alike(path, model, windows, options)
        gguf_file.write(model, path.with_name("decoded.gguf"), "float32", tokenizer)
        rows[-1]["alike in 32 bits"] = greedy_alike(path.with_name("decoded.gguf"), model, windows, options)
        path.unlink()
        for column in ("KL of the tool", "KL of torch"):
            rows[-1][f"× {column}"] = rows[-1][column] / rows[-2][column]
            rows[-1][f"× {column}, no imatrix"] = rows[-1][column] / rows[-3][column]
    return [{"model": folder.name} | row for row in rows]


def configuration(folder: pathlib.Path, options: argparse.Namespace, cache: pathlib.Path) -> Any:
    """Return the config of our files, calibrated as ``nashswarm compress --to gguf`` calibrates."""
    path = str(folder.resolve())
    dataset = texts.choose(
        str(options.calibration), path, False, calibration_windows=options.windows,
        holdout_windows=max(-(-options.windows // 3), 1), sequence_length=options.length,
    )  # fmt: skip
    method, source = GgufTypes(types=options.types), sources.ModelSource(path)
    return plan.config_of(source, method, dataset, Size(), cache=str(cache), records=str(cache / "records"))


def row(
    name: str, path: pathlib.Path, model: Any, expected: list[Tensor], windows: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure a file by the tool, and the ``model`` that it decodes to by torch."""
    printed = run_tool(options, path, path.parent / "logits", write=False)
    numbers: dict[str, Any] = {"file": name, "bytes": path.stat().st_size}
    for pattern, (column, scale) in PRINTED.items():
        numbers[column] = scale * float(re.findall(pattern, printed)[0])
    return numbers | {"KL of torch": divergence(expected, model, windows)}


def run_tool(options: argparse.Namespace, path: pathlib.Path, logits: pathlib.Path, write: bool) -> str:
    """Write the logits of a file with the tool, or compare those of a file with them; return what it prints.

    Raises ValueError with the last lines of the tool if it fails.
    """
    command = [options.tool, "--model", path, "--file", options.test, "--ctx-size", options.length, "--chunks",
               options.test_windows, "--threads", torch.get_num_threads(), "--kl-divergence-base", logits]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in (command if write else [*command, "--kl-divergence"])], capture_output=True, text=True
    )
    if done.returncode or not (write or "KLD" in done.stdout):
        raise ValueError(f"{options.tool} could not measure {path.name}: {(done.stderr + done.stdout)[-1000:]}")
    return done.stdout


def test_windows(text: str, tokenizer: Any, options: argparse.Namespace) -> Tensor:
    """Return the windows that the tool cuts, (windows, length)."""
    tokens = torch.tensor(tokenizer(text.removesuffix("\n"))["input_ids"])
    return tokens[: options.test_windows * options.length].view(-1, options.length)


def decoded(path: pathlib.Path, full: Any) -> Any:
    """Return the model with the weights that a file decodes to."""
    model = transformers.AutoModelForCausalLM.from_config(full.config, dtype=torch.float32).eval()
    model.load_state_dict(full.state_dict())
    stored = gguf_file.read(path, gguf_architectures.layout(full))
    weights = {layer.name: stored[f"{layer.name}.weight"].values for layer in matrices.find_layers(full)}
    matrices.set_weights(model, weights)
    return model


@torch.no_grad()
def log_probabilities(model: Any, window: Tensor) -> Tensor:
    """Return those of every next token of the second half of a window, (length / 2 − 1, tokens)."""
    logits: Tensor = model(input_ids=window[None]).logits[0, len(window) // 2 : -1]
    return logits.log_softmax(-1)


def divergence(expected: list[Tensor], model: Any, windows: Tensor) -> float:
    """Return KL(full ‖ model) in nats per token, of the second half of every window, as the tool counts."""
    total = 0.0
    for before, window in zip(expected, windows, strict=True):
        total += float((before.exp() * (before - log_probabilities(model, window))).sum(-1).mean())
    return total / len(windows)


def greedy_alike(path: pathlib.Path, model: Any, windows: Tensor, options: argparse.Namespace) -> float:
    """Return the share of greedy texts that llama.cpp with a file and torch with a ``model`` both write."""
    import llama_cpp

    texts, tokens = options.greedy
    model.generation_config.eos_token_id, alike = None, 0
    loaded = llama_cpp.Llama(str(path), n_ctx=PROMPT + tokens, n_threads=torch.get_num_threads(), verbose=False)
    for prompt in windows[:texts, :PROMPT]:
        said = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, max_new_tokens=tokens,
            pad_token_id=0,
        )[0, PROMPT:].tolist()  # fmt: skip
        stream = loaded.generate(prompt.tolist(), temp=0.0, repeat_penalty=1.0, reset=True)
        alike += said == [next(stream) for _ in range(tokens)]
    loaded.close()
    return alike / texts


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    columns = [
        "model",
        "file",
        "bytes",
        "KL of the tool",
        "top-1 %",
        "KL of torch",
        "× KL of the tool",
        "× KL of torch",
    ]
    columns += ["of the bytes asked", "regret", "greedy texts alike", "alike in 32 bits"]
    lines = [columns, [":--", ":--", *["--:"] * (len(columns) - 2)]]
    for row in rows:
        cells = {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in row.items()}
        cells |= {name: f"{row[name]:.4f}" for name in ("KL of torch", "of the bytes asked") if name in row}
        cells |= {name: f"{row[name]:.2f}" for name in row if name.startswith(("×", "greedy", "alike", "top-1"))}
        cells["KL of the tool"] = f"{row['KL of the tool']:.4f} ± {row['±']:.4f}"
        if "regret" in row:
            cells["regret"] = f"{row['regret']:.1e}"
        lines.append([cells.get(column, "-") for column in columns])
    note = "KL to the full model in nats per token. ×: of the stock mix with importance matrix at the same bytes."
    note += " Regret: what all tensors together could still gain at the price of a byte, as a share of the damage."
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{note}\n"


if __name__ == "__main__":
    sys.exit(main())
