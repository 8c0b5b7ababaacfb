"""The commands that load a compressed model: what is in it, how fast it runs, and serving or exporting it.

Each takes the words of the command line and brings back the exit status.  All raise ValueError in one sentence for
anything that does not fit.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from nashswarm import errors, memory
from nashswarm.data import corpus
from nashswarm.kernels import native
from nashswarm.measures import load
from nashswarm.measures.measure import EvaluationTarget
from nashswarm.measures.size import resident_bytes
from nashswarm.measures.speed import Speed
from nashswarm.models import evaluation, sources
from nashswarm.packed.modules import PackedMatrix, QuantizedLinear
from nashswarm.progress import show_progress
from nashswarm.runtime import cache_misses, memory_limit
from nashswarm.runtime import export as exporter
from nashswarm.runtime import profile as profiler
from nashswarm.runtime.machine import Machine, machine

if TYPE_CHECKING:
    from nashswarm.runtime.server import Limits

LOADING = 600  # seconds after which a process that does not answer is taken for dead
WIDE = 160  # columns of a table that goes to a file or a pipe, where nothing is to be cut off


def inspect(given: argparse.Namespace) -> int:
    """Print the table of the matrices, and the bytes in file and memory."""
    model = _load(given.folder)
    table = Table("matrix", "shape", "format", "bits in file", "in memory", "tiles by width", box=None)
    seen: set[PackedMatrix] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        matrix = getattr(module, "matrix", None)
        if not isinstance(matrix, PackedMatrix) or matrix in seen:
            continue
        seen.add(matrix)
        weights = matrix.shape[0] * matrix.shape[1]
        kind = "lattice" if matrix.lattice is not None else f"groups of {matrix.group_size}"
        tiled = matrix.tiles
        widths, counts = (part.tolist() for part in tiled.widths.unique(return_counts=True))
        tiles = ", ".join(f"{count}×{width}" for width, count in zip(widths, counts, strict=True))
        escapes = f", {len(tiled.escape_codes)} escapes" if len(tiled.escape_codes) else ""
        stored = f"{8 * len(matrix.encode()) / weights:.3f}"
        resident = f"{8 * tiled.nbytes / weights:.3f}"
        shape = "x".join(map(str, matrix.shape))
        table.add_row(name, shape, kind + (", coded" if matrix.coded else ""), stored, resident, tiles + escapes)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(table)
    size = sum((given.folder / name).stat().st_size for name in _weights(given.folder))
    console.print(f"{size:,} bytes of weights and config, {resident_bytes(model):,} bytes in memory")
    return 0


def bench(given: argparse.Namespace) -> int:
    """Print the times of decoding and prefill, beside those of the same weights as floats."""
    if min(given.threads, given.repeats, given.new_tokens) < 1:
        raise ValueError("--threads, --repeats and --new-tokens must be at least 1")
    torch.set_num_threads(given.threads)
    packed, full = _load_writer(given.folder, "bench times decoding"), _load(given.folder)
    full.dequantize()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.folder)
    length = sources.LoadedModel(full, tokenizer).window_length(None)
    windows = corpus.cut_windows(corpus.StdlibDocs().text("test"), tokenizer, length, "test")
    measure = Speed(given.prompt_tokens, given.context_tokens, given.new_tokens, given.repeats, given.against)

    def reference(batch_size: int) -> evaluation.Reference:
        return evaluation.compute_reference(full, windows[: measure.quality_windows], batch_size)

    subject = EvaluationTarget(full, full, lambda: packed, windows, reference, show_progress)
    found, _ = measure.measure(subject)
    print(json.dumps({"folder": str(given.folder), "threads": given.threads} | found, indent=1))
    return 0


def profile(given: argparse.Namespace) -> int:
    """Print where the time of a step goes, by matrix and by batch size."""
    if min(given.threads, given.steps, given.context_tokens, given.largest_batch) < 1:
        raise ValueError("--threads, --steps, --context-tokens and --largest-batch must be at least 1")
    counter = cache_misses.tool() if given.misses else None
    model = _load_writer(given.folder, "profile times decoding")
    largest = _largest(model) if given.misses else None
    longest = sources.LoadedModel(model, None).window_length(None)
    if given.context_tokens + given.steps + profiler.WARM_UP > longest:
        raise ValueError(f"--context-tokens, --steps and {profiler.WARM_UP} to warm up exceed the window of {longest}")
    torch.set_num_threads(given.threads)
    here = machine()
    speed = profiler.bandwidth(min(max(profiler.BEYOND * max(here.caches.values()), 1 << 26), 1 << 29))
    tokens = torch.randint(model.config.vocab_size, (1, given.context_tokens), generator=torch.manual_seed(0))
    found, whole = profiler.layers(model, tokens, given.steps, show_progress)
    table = Table("matrix", "format", "bytes", "fits", "µs", "GB/s", "of memory's", "of the step", box=None)
    for layer in found:
        share, reached = layer.seconds / whole, layer.bandwidth / speed
        table.add_row(
            layer.name, layer.kind, f"{layer.size:,}", here.level(layer.size), f"{1e6 * layer.seconds:.0f}",
            f"{layer.bandwidth / 1e9:.1f}", f"{reached:.0%}", f"{share:.1%}",
        )  # fmt: skip
    rest = whole - sum(layer.seconds for layer in found)
    table.add_row("everything else", "", "", "", f"{1e6 * rest:.0f}", "", "", f"{rest / whole:.1%}")
    size = sum(layer.size for layer in found)
    batches = [1 << power for power in range(given.largest_batch.bit_length())]
    points = profiler.curve(model, tokens, batches, given.steps, show_progress)
    steps = Table("batch", "ms a step", "tokens per second", box=None)
    for point in points:
        steps.add_row(str(point.batch), f"{1000 * point.seconds:.2f}", f"{point.throughput:.0f}")
    limit = None if given.latency_ms is None else given.latency_ms / 1000
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(str(here), highlight=False)
    console.print(f"reading memory: {speed / 1e9:.1f} GB/s with {given.threads} threads; kernels: {native.path()}")
    console.print(table)
    console.print(f"a step reads {size:,} bytes of matrices, which fit in {here.level(size)}, in {1000 * whole:.2f} ms")
    console.print(steps)
    console.print(profiler.best(points, limit)[1])
    if counter is not None and largest is not None:
        _count_misses(*largest, here, *counter, console)
    _tell_memory(model, longest, given.memory_mb, console)
    return 0


def _tell_memory(model: Any, window: int, limit: float | None, console: Console) -> None:
    """Print where the bytes of the model and the process are, and how long a text fits within ``limit`` megabytes."""
    packed, others = (sum(part.nbytes for part in group) for group in memory_limit.weights(model))
    console.print(f"in memory: {packed:,} bytes of packed matrices, {others:,} of other weights", highlight=False)
    if (size := memory_limit.token_bytes(model)) is not None:
        console.print(f"{size:,} bytes of cache for each token of a text", highlight=False)
    if found := memory.usage_by_kind():
        console.print(
            f"the process holds {found['own']:,} bytes of its own and {found['mapped']:,} of mapped files; "
            f"{found['pinned']:,} are pinned", highlight=False,
        )  # fmt: skip
    if limit is not None:
        tokens, held = memory_limit.longest(model, int(1e6 * limit), window)
        console.print(f"within {limit:g} MB: texts of {tokens} tokens, {1e-6 * held:.0f} MB at the peak")


def _largest(model: Any) -> tuple[str, QuantizedLinear]:
    """The largest packed matrix.  Raises ValueError if there is none."""
    named = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not named:
        raise ValueError("no matrix of the model is multiplied packed: there are no cache misses to compare")
    return max(named.items(), key=lambda item: math.prod(item[1].matrix.shape))


def _count_misses(name: str, module: QuantizedLinear, here: Machine, counter: str, why: str, console: Console) -> None:
    """Print how often a product with the matrix misses the caches, packed and as floats."""
    tiles, last = module.matrix.tiles, max(here.caches)
    forms: dict[str, tuple[str | None, int]]
    forms = {"packed": (module.activations, tiles.nbytes), "float32": (None, 4 * tiles.rows * tiles.columns)}
    table = Table("form", "bytes", "reads", "that miss L1", f"that miss L{last}", box=None)
    for form, (activations, size) in show_progress(list(forms.items()), "counting cache misses"):
        found = cache_misses.count([tiles], activations, here.caches[1], here.caches[last], counter)
        table.add_row(form, *(f"{max(value, 0):,.0f}" for value in (size, found.reads, found.first, found.last)))
    console.print(f"cache misses of a product with {name}, {tiles.rows}x{tiles.columns}, one column", highlight=False)
    console.print(why)
    console.print(table)


def serve(given: argparse.Namespace) -> int:
    """Answer HTTP requests until interrupted, by a process that is replaced if it dies."""
    errors.require("serve", load.Load.NEEDS, load.Load.EXTRA)
    if given.threads < 1 or given.queue < 0 or given.patience <= 0 or not 0 <= given.port < 65536:
        raise ValueError("--threads must be at least 1, --queue 0, --patience above 0 and --port below 65536")
    import uvicorn
    from uvicorn.config import STARTUP_FAILURE

    from nashswarm.runtime.server import Limits, Supervisor

    _check_writer(given.folder, "there is nothing to serve")
    started = functools.partial(
        _application,
        given.folder,
        given.name or given.folder.resolve().name,
        given.threads,
        Limits(given.queue, given.patience),
        given.memory_mb,
        given.pin,
    )
    config = uvicorn.Config(
        started, factory=True, host=given.host, port=given.port, lifespan="off", timeout_worker_healthcheck=LOADING
    )
    with config.bind_socket() as listening:
        supervisor = Supervisor(config, [listening])
        supervisor.run()
    return int(any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes))


def _application(
    folder: pathlib.Path, name: str, threads: int, limits: "Limits", memory_mb: float | None, pinned: bool
) -> Any:
    """What the process that answers runs."""
    from uvicorn.config import STARTUP_FAILURE

    from nashswarm.runtime import server

    torch.set_num_threads(threads)
    try:
        model, tokenizer = _load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        if pinned:
            print(f"{memory_limit.pin(model):,} bytes of weights are pinned", file=sys.stderr)
        if memory_mb is not None:
            window = sources.LoadedModel(model, tokenizer).window_length(None)
            tokens, held = memory_limit.longest(model, int(1e6 * memory_mb), window)
            print(f"texts of up to {tokens} tokens are answered: {1e-6 * held:.0f} MB at the peak", file=sys.stderr)
            limits = dataclasses.replace(limits, tokens=tokens)
    except (ValueError, OSError, RuntimeError) as error:  # the last: torch got no memory
        print(error, file=sys.stderr)
        sys.exit(STARTUP_FAILURE)  # another process would do no better
    return server.application(model, tokenizer, name, limits)


def export(given: argparse.Namespace) -> int:
    """Write the model for another runtime, and print how far its logits are from the model's own."""
    model = _load(given.folder)
    exporter.check(model, given.to, given.out, given.activations)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.folder)
    length = exporter.PROMPT + exporter.DECODED
    tokens = corpus.cut_windows(corpus.StdlibDocs().text("test"), tokenizer, length, "test")[:1]
    found = exporter.export(model, given.to, given.out, tokens, given.activations, given.dtype)
    print(json.dumps({"file": str(given.out), "to": given.to} | found, indent=1))
    return 0


def _load(folder: pathlib.Path) -> Any:
    """The compressed model in ``folder``, in float32."""
    return _architecture(folder).from_pretrained(folder, dtype=torch.float32)


def _load_writer(folder: pathlib.Path, why: str) -> Any:
    """The same of a model that writes text.  Raises ValueError, and says ``why``, for another."""
    _check_writer(folder, why)
    return _load(folder)


def _check_writer(folder: pathlib.Path, why: str) -> None:
    architecture = _architecture(folder)
    if not architecture.can_generate():
        raise ValueError(f"{folder} holds a {architecture.__name__}, which writes no text: {why}")


def _architecture(folder: pathlib.Path) -> Any:
    """The class of the compressed model in ``folder``.  Raises ValueError if there is none."""
    if not (folder / sources.CONFIG).is_file():
        raise ValueError(f"{folder} holds no {sources.CONFIG}: name a folder that nashswarm compress made")
    described = json.loads((folder / sources.CONFIG).read_text())
    if "quantization_config" not in described:
        raise ValueError(f"the model in {folder} is not compressed: use nashswarm compress first")
    return getattr(transformers, described["architectures"][0])


def _weights(folder: pathlib.Path) -> list[str]:
    return [sources.CONFIG, *(path.name for path in sorted(folder.glob("model*.safetensors*")))]
