"""The command ``nashswarm``: compress a model, and work with compressed ones."""

import argparse
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence

import torch

from nashswarm import __version__, errors, inference
from nashswarm.experiment import commands, compress_options, doctor, typed_export
from nashswarm.experiment.certify import LIMIT
from nashswarm.kernels import ACTIVATIONS
from nashswarm.measures.contestants import CONTESTANTS
from nashswarm.models import checks
from nashswarm.progress import end_interrupted
from nashswarm.runtime import export

OPTIONS = {  # what messages call by its key in a configuration
    "method.bits": "--bits",
    "method.effort": "--effort",
    "method.types": "--types",
    "model.exclude": "--exclude",
    "model.path": "MODEL",
    "dataset.source": "--calibration",
    "dataset.path": "--calibration",
    "dataset.sequence_length": "--length",
    "dataset.calibration_windows": "--windows",
    "dataset.holdout_windows": "--windows",
    "measure.prompt_tokens": "--prompt-tokens",
    "measure.context_tokens": "--context-tokens",
    "measure.new_tokens": "--new-tokens",
    "measure.repeats": "--repeats",
    "save": "--out",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 2 for a mistake, which one sentence on stderr names."""
    parsed = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("nashswarm").setLevel(logging.WARNING if parsed.quiet else logging.NOTSET)
    try:
        with errors.in_words_of(OPTIONS), checks.quiet_transformers():
            return int(parsed.run(parsed))
    except (ValueError, OSError) as error:
        print(f"nashswarm {parsed.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return end_interrupted(f"nashswarm {parsed.command}: interrupted; the same command goes on from what is cached")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; every subcommand names the function that runs it."""
    parser = argparse.ArgumentParser(
        "nashswarm",
        description="Compress language models, and work with compressed ones.",
        epilog="Sweeps, ablations and records: python -m experiments.run --help in a checkout of the repository.",
    )
    parser.add_argument("--version", action="version", version=f"nashswarm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], does: str, description: str, epilog: str | None = None
    ) -> argparse.ArgumentParser:
        subparser = subparsers.add_parser(name, help=does, description=description, epilog=epilog)
        subparser.set_defaults(run=run)
        subparser.add_argument("--quiet", action="store_true", help="no progress, only warnings and the result")
        return subparser

    into = command(
        "compress",
        commands.compress,
        "compress a model into a folder that transformers loads",
        "Compress MODEL, a folder in Hugging Face layout or a name on the hub, into FOLDER: packed "
        "weights, tokenizer, model card, and what certifies it. Prints one JSON object.",
    )
    compress_options.add_all(into)

    rebudgeted = command(
        "rebudget",
        commands.rebudget,
        "compress the same model again to another size, from the remembered game",
        "Compress the model that FOLDER was made of to another number of bits. Statistics and games that "
        "the cache remembers are not computed again. Prints one JSON object.",
    )
    _add_folder(rebudgeted)
    rebudgeted.add_argument("--bits", type=float, required=True)
    compress_options.add_no_verify(rebudgeted)
    _add_out(rebudgeted)
    _add_paths(rebudgeted)

    inspected = command(
        "inspect",
        inference.inspect,
        "what is in a compressed model: formats and bytes by layer",
        "List the matrices of the compressed model in FOLDER: shape, format, bits in the file, bits in "
        "memory, and the widths of its tiles there.",
    )
    _add_folder(inspected)

    timed = command(
        "bench",
        inference.bench,
        "how fast a compressed model runs here",
        "Time decoding and prefill of the compressed model in FOLDER against its own weights as 32-bit "
        "floats, interleaved in one process. Prints one JSON object.",
    )
    _add_folder(timed)
    _add_threads(timed)
    timed.add_argument("--prompt-tokens", type=int, help="default: 512 or half the window, whichever is less")
    timed.add_argument("--context-tokens", type=int, default=32, help="before those decoded (32)")
    timed.add_argument("--new-tokens", type=int, default=32)
    timed.add_argument("--repeats", type=int, default=30)
    timed.add_argument("--against", nargs="+", default=(), choices=sorted(CONTESTANTS))

    profiled = command(
        "profile",
        inference.profile,
        "where the time of a compressed model goes, by layer and by batch size",
        "Time every matrix product of decoding with the compressed model in FOLDER, its bytes and the "
        "share of this machine's memory bandwidth that it reaches beside it, and steps of growing batches.",
    )
    _add_folder(profiled)
    _add_threads(profiled)
    profiled.add_argument("--context-tokens", type=int, default=32, help="before those decoded (32)")
    profiled.add_argument("--steps", type=int, default=30, help="timed steps (30)")
    profiled.add_argument("--largest-batch", type=int, default=16, help="batches of 1, 2, 4 … are tried up to it (16)")
    profiled.add_argument("--latency-ms", type=float, help="the longest step that the batch size may cost")
    _add_memory(profiled)
    profiled.add_argument(
        "--misses", action="store_true", help="also count cache misses of a product with the largest matrix, packed "
        "and as floats: by perf stat, or by valgrind where the processor's counters are closed"
    )  # fmt: skip

    served = command(
        "serve",
        inference.serve,
        "answer HTTP requests in the words of OpenAI's API",
        "Serve the compressed model in FOLDER: POST /v1/completions and /v1/chat/completions, streamed or whole, GET "
        "/v1/models and /health. Requests are computed together; a full queue answers 429, too long a wait 503.",
    )
    _add_folder(served)
    _add_threads(served)
    served.add_argument("--host", default="127.0.0.1", help="127.0.0.1: for this machine alone")
    served.add_argument("--port", type=int, default=8000)
    served.add_argument("--batch", type=int, default=16, help="requests computed at once (16)")
    served.add_argument("--queue", type=int, default=16, help="requests that may wait (16)")
    served.add_argument("--patience", type=float, default=60.0, help="seconds that one may wait (60)")
    served.add_argument("--name", help="of the model in requests; default: the folder's")
    served.add_argument(
        "--cors-origins", type=inference.origin, nargs="+", default=(), metavar="ORIGIN",
        help="whose pages may ask from a browser, as http://localhost:3000, or '*' for all; default: none",
    )  # fmt: skip
    _add_memory(served)
    served.add_argument("--pin", action="store_true", help="keep the weights in memory, whatever else runs (mlock)")

    talked = command(
        "chat",
        inference.chat,
        "talk with a compressed model in the terminal",
        "Talk with the compressed model in FOLDER in the words of its chat template, one line a message. Answers come "
        "as they are written; Ctrl-C stops one, Ctrl-D leaves.",
    )
    _add_folder(talked)
    _add_threads(talked)
    talked.add_argument("--system", metavar="TEXT", help="what the model is told first; default: as its template says")
    talked.add_argument("--temperature", type=float, default=0.7, help="0 takes the most probable token (0.7)")
    talked.add_argument(
        "--top-p", type=float, default=0.95, help="probability of the tokens that are drawn from (0.95)"
    )
    talked.add_argument("--max-tokens", type=int, help="of an answer; default: as many as the model can read")
    talked.add_argument("--seed", type=int, help="the same answers each time")

    exported = command(
        "export",
        inference.export,
        "a compressed model as one file for onnxruntime, or as a program of torch.export",
        "Write the compressed model in FOLDER, weights packed, cache in and out, to FILE, and compare its "
        "logits with the model's own on real text. onnx: MatMulNBits of onnxruntime, and bit planes; onnx-qdq: INT4 "
        "and INT8 codes in standard operators, four bits of a weight or more; torch-export: this package's kernels; "
        "gguf, compressed-tensors: the full model again, in types of llama.cpp, of vLLM. Prints one JSON object.",
    )
    _add_folder(exported)
    exported.add_argument("--to", choices=sorted([*export.TARGETS, *typed_export.KINDS]), required=True)
    exported.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE", help="a new file or folder")
    exported.add_argument("--target-bits", type=float, help="of gguf, compressed-tensors: everything counted")
    compress_options.add_target(exported)
    _add_paths(exported)
    exported.add_argument(
        "--activations", choices=ACTIVATIONS, default="float32", help="what inputs of products are rounded to (float32)"
    )
    exported.add_argument(
        "--dtype", choices=export.DTYPES, default="float32", help="of what is not quantized, in the file (float32)"
    )

    checked = command(
        "certify",
        commands.certify,
        "compute a compressed model's regret again from its file",
        "Decode the compressed model in FOLDER, calibrate the full model as it was calibrated then, and "
        "enumerate what every player could still gain by changing alone, with code that shares no sum with the "
        "program that compressed it. Prints one JSON object.",
        epilog="Exit status: 0 if the regret agrees with the recorded one and is at most "
        f"{LIMIT:g} nats per token, 1 if not, 2 if it could not be computed.",
    )
    _add_folder(checked)
    _add_paths(checked)
    checked.add_argument(
        "--tiles", type=int, metavar="N", help="try the rates of N trellis tiles alone, drawn by lot (all)"
    )

    begun = command(
        "quickstart",
        _quickstart,
        "the ablation on the model that comes along, to a table, a figure and a page",
        "Compress the embedded model by nash_swarm, its ablations and other methods, and show what each costs; no "
        "download. Run again, it continues.",
    )
    begun.add_argument("--out", type=pathlib.Path, default=pathlib.Path("quickstart"), metavar="FOLDER")
    begun.add_argument("--jobs", type=int, default=2, help="processes, each on one thread (2)")

    examined = command(
        "doctor",
        lambda arguments: doctor.doctor(arguments.cache),
        "whether this installation works",
        "Show versions, kernels, threads, extras and caches, and try products and a tiny compression.",
        epilog="Exit status: 0 if everything works, 1 if not.",
    )
    examined.add_argument(
        "--cache",
        type=pathlib.Path,
        default=compress_options.CACHE,
        help=f"that the commands use ({compress_options.CACHE})",
    )
    return parser


def _quickstart(arguments: argparse.Namespace) -> int:
    from nashswarm.reporting import quickstart  # brings pandas and matplotlib, which no other command needs

    return quickstart.quickstart(arguments.out, arguments.jobs)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER", help="of a model that compress or save= made")


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-mb", type=inference.megabytes, metavar="MB", help="try how long a text it can take and hold no more"
    )


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all that torch takes")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER", help="new or empty")


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="the full model, if it no longer lies where it lay")
    parser.add_argument("--dataset", metavar="PATH", help="its calibration text, if it no longer lies where it lay")
