"""The commands on compressed models: inspect, bench, profile, serve, chat and export.

Each function takes the parsed command line and returns the exit status.  All raise ValueError in one sentence for
arguments or models that they cannot use.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from nashswarm import errors, memory
from nashswarm.data import corpus
from nashswarm.experiment import commands, typed_export
from nashswarm.kernels import native
from nashswarm.kernels.tiles import Tiles
from nashswarm.measures import load
from nashswarm.measures.measure import EvaluationTarget
from nashswarm.measures.size import resident_bytes
from nashswarm.measures.speed import Speed
from nashswarm.models import checks, compressed_tensors_folder, evaluation, sources
from nashswarm.packed.matrix import TileMatrix
from nashswarm.packed.modules import Activations, QuantizedLinear
from nashswarm.progress import show_progress
from nashswarm.runtime import cache_misses, folder_table, memory_limit, type_table
from nashswarm.runtime import export as exporter
from nashswarm.runtime import profile as profiler
from nashswarm.runtime.machine import Machine, read_machine
from nashswarm.runtime.serving import chat as talk
from nashswarm.runtime.serving.engine import Engine, Limits
from nashswarm.runtime.serving.steps import ModuleStepper
from nashswarm.runtime.serving.text import end_tokens, longest_text

LOADING_TIMEOUT = 600  # seconds after which a process that does not answer is restarted
PIPE_WIDTH = 160  # columns of a table that is written to a file or a pipe, so that no cell is cut


def inspect(args: argparse.Namespace) -> int:
    """Print a table of the matrices, and what all other tensors are, which add up to the model's files."""
    if args.folder.is_file() or compressed_tensors_folder.is_one(args.folder):
        return type_table.show(args.folder, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    model, files = _load(args.folder), _weights(args.folder)
    size = folder_table.show(args.folder, model, files, console)
    console.print(f"{size:,} bytes of weights and config, {resident_bytes(model):,} bytes in memory")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Print the times of decoding and prefill, for the packed model and for the same weights as floats."""
    if min(args.threads, args.repeats, args.new_tokens) < 1:
        raise ValueError("--threads, --repeats and --new-tokens must be at least 1")
    torch.set_num_threads(args.threads)
    packed, full = _load_language_model(args.folder, "bench times decoding"), _load(args.folder)
    full.dequantize()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    length = sources.LoadedModel(full, tokenizer).window_length(None)
    windows = corpus.cut_windows(corpus.StdlibDocs().text("test"), tokenizer, length, "test")
    measure = Speed(args.prompt_tokens, args.context_tokens, args.new_tokens, args.repeats, args.against)

    def reference(batch_size: int) -> evaluation.Reference:
        return evaluation.compute_reference(full, windows[: measure.quality_windows], batch_size)

    target = EvaluationTarget(full, full, lambda: packed, windows, reference, show_progress)
    metrics, _ = measure.measure(target)
    print(json.dumps({"folder": str(args.folder), "threads": args.threads} | metrics, indent=1))
    return 0


def profile(args: argparse.Namespace) -> int:
    """Print the times of a decoding step by matrix and by batch size, the memory, and on request the cache misses."""
    if min(args.threads, args.steps, args.context_tokens, args.largest_batch) < 1:
        raise ValueError("--threads, --steps, --context-tokens and --largest-batch must be at least 1")
    counter = cache_misses.choose_counter() if args.misses else None
    model = _load_language_model(args.folder, "profile times decoding")
    largest = _largest(model) if args.misses else None
    longest = sources.LoadedModel(model, None).window_length(None)
    if args.context_tokens + args.steps + profiler.WARM_UP > longest:
        raise ValueError(f"--context-tokens, --steps and {profiler.WARM_UP} to warm up exceed the window of {longest}")
    torch.set_num_threads(args.threads)
    machine = read_machine()
    array_bytes = min(max(profiler.BEYOND * max(machine.caches.values()), 1 << 26), 1 << 29)
    bandwidth = profiler.read_bandwidth(array_bytes)
    tokens = torch.randint(model.config.vocab_size, (1, args.context_tokens), generator=torch.manual_seed(0))
    layers, step_seconds = profiler.time_layers(model, tokens, args.steps, show_progress)
    table = Table("matrix", "format", "bytes", "fits", "µs", "GB/s", "of memory's", "of the step", box=None)
    for layer in layers:
        share, reached = layer.seconds / step_seconds, layer.bandwidth / bandwidth
        table.add_row(
            layer.name, layer.kind, f"{layer.size:,}", machine.level(layer.size), f"{1e6 * layer.seconds:.0f}",
            f"{layer.bandwidth / 1e9:.1f}", f"{reached:.0%}", f"{share:.1%}",
        )  # fmt: skip
    rest = step_seconds - sum(layer.seconds for layer in layers)
    table.add_row("everything else", "", "", "", f"{1e6 * rest:.0f}", "", "", f"{rest / step_seconds:.1%}")
    size = sum(layer.size for layer in layers)
    batches = [1 << power for power in range(args.largest_batch.bit_length())]
    batch_times = profiler.time_batches(model, tokens, batches, args.steps, show_progress)
    batch_table = Table("batch", "ms a step", "tokens per second", box=None)
    for time in batch_times:
        batch_table.add_row(str(time.batch), f"{1000 * time.seconds:.2f}", f"{time.throughput:.0f}")
    limit = None if args.latency_ms is None else args.latency_ms / 1000
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(str(machine), highlight=False)
    console.print(f"reading memory: {bandwidth / 1e9:.1f} GB/s with {args.threads} threads; kernels: {native.path()}")
    console.print(table)
    console.print(
        f"a step reads {size:,} bytes of matrices, which fit in {machine.level(size)}, in {1000 * step_seconds:.2f} ms"
    )
    console.print(batch_table)
    console.print(profiler.choose_batch(batch_times, limit)[1])
    if counter is not None and largest is not None:
        _print_misses(*largest, machine, *counter, console)
    _print_memory(model, longest, args.memory_mb, console)
    return 0


def _print_memory(model: Any, window: int, limit: float | None, console: Console) -> None:
    """Print the memory of the model and the process, and the longest text that fits within ``limit`` megabytes."""
    packed, others = (sum(part.nbytes for part in group) for group in memory_limit.weight_tensors(model))
    console.print(f"in memory: {packed:,} bytes of packed matrices, {others:,} of other weights", highlight=False)
    if (size := memory_limit.token_bytes(model)) is not None:
        console.print(f"{size:,} bytes of cache for each token of a text", highlight=False)
    if held := memory.usage_by_kind():
        console.print(
            f"the process holds {held['own']:,} bytes of its own and {held['mapped']:,} of mapped files; "
            f"{held['pinned']:,} are pinned", highlight=False,
        )  # fmt: skip
    if limit is not None:
        tokens, peak = memory_limit.longest_text(model, int(1e6 * limit), window)
        console.print(f"within {limit:g} MB: texts of {tokens} tokens, {1e-6 * peak:.0f} MB at the peak")


def _largest(model: Any) -> tuple[str, Tiles, Activations]:
    """Return the name, the tiles and the activations of the largest matrix in tiles.

    Raises ValueError if there is none.
    """
    named = {
        name: (module.matrix.tiles, module.activations)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and isinstance(module.matrix, TileMatrix)
    }
    if not named:
        raise ValueError(
            "cache misses are counted for matrices in tiles, of which the model has none: leave out --misses"
        )
    name = max(named, key=lambda name: named[name][0].rows * named[name][0].columns)
    return name, *named[name]


def _print_misses(
    name: str, tiles: Tiles, packed: Activations, machine: Machine, counter: str, reason: str, console: Console
) -> None:
    """Print how many reads of a product with the matrix miss the caches, packed and as floats."""
    last = max(machine.caches)
    forms: dict[str, tuple[str | None, int]]
    forms = {"packed": (packed, tiles.nbytes), "float32": (None, 4 * tiles.rows * tiles.columns)}
    table = Table("form", "bytes", "reads", "that miss L1", f"that miss L{last}", box=None)
    for form, (activations, size) in show_progress(list(forms.items()), "counting cache misses"):
        misses = cache_misses.count_misses([tiles], activations, machine.caches[1], machine.caches[last], counter)
        counts = (size, misses.reads, misses.first, misses.last)
        table.add_row(form, *(f"{max(count, 0):,.0f}" for count in counts))
    console.print(f"cache misses of a product with {name}, {tiles.rows}x{tiles.columns}, one column", highlight=False)
    console.print(reason)
    console.print(table)


def serve(args: argparse.Namespace) -> int:
    """Answer HTTP requests until interrupted, in a process that is restarted if it dies."""
    errors.require("serve", load.Load.NEEDS, load.Load.EXTRA)
    if min(args.threads, args.batch) < 1 or args.queue < 0 or args.patience <= 0 or not 0 <= args.port < 65536:
        raise ValueError("--threads and --batch must be at least 1, --queue 0, --patience above 0, --port below 65536")
    import uvicorn
    from uvicorn.config import STARTUP_FAILURE

    from nashswarm.runtime.serving.host import Supervisor

    _check_language_model(args.folder, "there is nothing to serve")
    name, limits = args.name or args.folder.resolve().name, Limits(args.queue, args.batch, args.patience)
    build = functools.partial(
        _build_app, args.folder, name, args.threads, limits, args.memory_mb, args.pin, args.cors_origins
    )
    config = uvicorn.Config(
        build, factory=True, host=args.host, port=args.port, lifespan="off", timeout_worker_healthcheck=LOADING_TIMEOUT,
        timeout_graceful_shutdown=5,  # seconds that answers may still take once the server is to end
    )  # fmt: skip
    with config.bind_socket() as listening:
        supervisor = Supervisor(config, [listening])
        supervisor.run()
    return int(any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes))


def _build_app(
    folder: pathlib.Path, name: str, threads: int, limits: Limits, memory_mb: float | None, pinned: bool,
    origins: Sequence[str] = (),
) -> Any:  # fmt: skip
    """Load the model and build the server's application, in the process that answers requests."""
    from uvicorn.config import STARTUP_FAILURE

    from nashswarm.runtime.serving import server

    torch.set_num_threads(threads)
    try:
        model, tokenizer = _load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        if pinned:
            print(f"{memory_limit.pin(model):,} bytes of weights are pinned", file=sys.stderr)
        if memory_mb is not None:
            tokens, peak = memory_limit.longest_text(model, int(1e6 * memory_mb), longest_text(model))
            print(f"texts of up to {tokens} tokens are answered: {1e-6 * peak:.0f} MB at the peak", file=sys.stderr)
            limits = dataclasses.replace(limits, tokens=tokens)
        return server.build_app(model, tokenizer, name, limits, origins=origins)
    except Exception as error:  # whatever a model raises: a new process would fail in the same way
        told = isinstance(error, ValueError | OSError | RuntimeError)  # RuntimeError: torch got no memory
        print(error if told else traceback.format_exc(), file=sys.stderr)
        sys.exit(STARTUP_FAILURE)


def chat(args: argparse.Namespace) -> int:
    """Talk with the model in the terminal until the input ends."""
    if args.threads < 1 or not 0 <= args.temperature <= 2 or not 0 <= args.top_p <= 1 or (args.max_tokens or 1) < 1:
        raise ValueError("--threads and --max-tokens are 1 or more, --temperature between 0 and 2, --top-p 0 and 1")
    _check_language_model(args.folder, "there is nobody to talk with")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer in {args.folder} has no chat template: serve completes texts without one")
    torch.set_num_threads(args.threads)
    model = _load(args.folder)
    settings = talk.Settings(args.system, args.temperature, args.top_p, args.max_tokens, args.seed)
    with contextlib.closing(Engine(ModuleStepper(model), tokenizer, end_tokens(model, tokenizer), Limits())) as engine:
        talk.talk(engine, tokenizer, longest_text(model), settings)
    return 0


def export(args: argparse.Namespace) -> int:
    """Write the model for another runtime, and print how far its logits are from those of the model."""
    if args.to in typed_export.KINDS:
        return commands.export_typed(args)
    model = _load(args.folder)
    exporter.check_exportable(model, args.to, args.out, args.activations)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    length = exporter.PROMPT + exporter.DECODED
    tokens = corpus.cut_windows(corpus.StdlibDocs().text("test"), tokenizer, length, "test")[:1]
    metrics = exporter.export(model, args.to, args.out, tokens, args.activations, args.dtype)
    print(json.dumps({"file": str(args.out), "to": args.to} | metrics, indent=1))
    return 0


def origin(text: str) -> str:
    """Return an origin as browsers write it.  Raises ArgumentTypeError for anything else, which would never match."""
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin: write scheme, host and port, http://localhost:3000")
    return text


def megabytes(text: str) -> float:
    """Return the megabytes that an option names.  Raises ArgumentTypeError, of which argparse prints the message."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no number of megabytes above 0")


def _load(folder: pathlib.Path) -> Any:
    """Load the compressed model in ``folder`` with float32."""
    return checks.compressed_class(folder).from_pretrained(folder, dtype=torch.float32)


def _load_language_model(folder: pathlib.Path, reason: str) -> Any:
    """Load a model that generates text.  Raises ValueError with the ``reason`` for another model."""
    _check_language_model(folder, reason)
    return _load(folder)


def _check_language_model(folder: pathlib.Path, reason: str) -> None:
    architecture = checks.compressed_class(folder)
    if not architecture.can_generate():
        raise ValueError(f"{folder} holds a {architecture.__name__}, which writes no text: {reason}")


def _weights(folder: pathlib.Path) -> list[str]:
    return [sources.CONFIG, *(path.name for path in sorted(folder.glob("model*.safetensors*")))]
