"""The options of the command ``nashswarm compress``, of which ``rebudget`` and ``export`` share some."""

import argparse
import pathlib
from typing import get_args

from nashswarm import api
from nashswarm.experiment import typed_export
from nashswarm.methods.nash_swarm.settings import Effort
from nashswarm.models import shapes

CACHE = pathlib.Path("~/.cache/nashswarm")


def add_all(parser: argparse.ArgumentParser) -> None:
    """Add all options of ``compress``."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub name; 'default' is the one that comes along")
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FOLDER", help="new or empty; of --to gguf a new .gguf file"
    )
    parser.add_argument(
        "--bits", "--target-bits", type=float, help="stored bits per parameter, everything counted (3.0)"
    )  # fmt: skip
    parser.add_argument("--to", choices=typed_export.KINDS, help="for vLLM or llama.cpp, whose types tensors choose")
    add_target(parser)
    parser.add_argument("--method", choices=sorted(api.METHODS), help="default: nash_swarm")
    parser.add_argument(
        "--effort", choices=get_args(Effort), default="default", help="of nash_swarm (quick: one pass), nash_lattice"
    )
    parser.add_argument(
        "--calibration", metavar="TEXT", help="a text file or folder, or embedded, code, own (sampled by the model), "
        "hub, or several joined by +; default: the hub's text if it can be reached, else own, with embedded"
    )  # fmt: skip
    parser.add_argument("--column", help="of FILE or folder as --calibration, where it is a table; default: its text")
    parser.add_argument(
        "--windows", type=int, help="of calibration text (48 if it has them, by layer 4); a third more is held out"
    )
    parser.add_argument(
        "--length", type=int, help="tokens in a window; default: the model's maximum, 512 at most (by layer 2048)"
    )
    parser.add_argument("--exclude", nargs="+", default=(), metavar="PATTERN", help="matrices to leave at 16 bits")
    parser.add_argument("--seed", type=int, default=0)
    add_no_verify(parser)
    parser.add_argument("--cache", type=pathlib.Path, default=CACHE, help=f"of statistics and games ({CACHE})")
    parser.add_argument(
        "--plan", action="store_true", help="only tell the bytes, seconds and memory that it will take; MODEL may also "
        f"be one of {', '.join(sorted(shapes.SHAPES.keys() | shapes.LARGE.keys()))}"
    )  # fmt: skip
    large = parser.add_argument_group("models larger than memory")
    large.add_argument(
        "--by-layer", action="store_true", help="a decoder in a folder, one of its blocks in memory; "
        "the same command goes on where a killed run stopped; with --method gptq, which --plan forecasts, --bits is "
        "the width of a weight"
    )  # fmt: skip
    large.add_argument("--head-bits", type=int, help="of embedding and head, by gptq (--bits, but at least 4)")
    large.add_argument("--sweeps", type=int, default=0, help="of best replies after error feedback (0)")


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the options of a size to meet, and of the types to meet it with."""
    parser.add_argument(
        "--target-size", type=typed_export.size, metavar="SIZE", help="of gguf, compressed-tensors: at most, as 4.2GB"
    )
    parser.add_argument(
        "--types", nargs="+", metavar="TYPE", help="that tensors choose among: Q4_K, Q8_0 ...; int4-g128, int8-g32 ..."
    )


def add_no_verify(parser: argparse.ArgumentParser) -> None:
    """Add the option that skips the comparison of a folder with the model it was made from."""
    parser.add_argument(
        "--no-verify", action="store_true", help="do not open the folder in a new process to compare it bit by bit"
    )
