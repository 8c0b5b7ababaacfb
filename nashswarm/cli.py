"""The command ``nashswarm``: what can be done with a compressed model."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from nashswarm import __version__
from nashswarm.certify import LIMIT, certify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand: its exit status, 2 for a mistake that one sentence names."""
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except (ValueError, OSError) as error:
        print(f"nashswarm {given.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "nashswarm",
        description="Work with language models that nashswarm has compressed.",
        epilog="A model is compressed by: python -m experiments.run method=nash_swarm save=FOLDER",
    )
    parser.add_argument("--version", action="version", version=f"nashswarm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    checked = commands.add_parser(
        "certify",
        help="compute a compressed model's regret again from its file",
        description="Decode the compressed model in FOLDER, calibrate the full model as it was calibrated then, and "
        "enumerate what every player could still gain by changing alone, with code that shares no sum with the "
        "program that compressed it. Prints one JSON object.",
        epilog="Exit status: 0 if the regret agrees with the recorded one and is at most "
        f"{LIMIT:g} nats per token, 1 if not, 2 if it could not be computed.",
    )
    checked.add_argument("folder", type=pathlib.Path, metavar="FOLDER", help="the folder that save=FOLDER named")
    checked.add_argument("--model", metavar="PATH", help="the full model, if it no longer lies where it lay")
    checked.add_argument("--dataset", metavar="PATH", help="its calibration text, if it no longer lies where it lay")
    checked.set_defaults(run=_certify)
    return parser


def _certify(given: argparse.Namespace) -> int:
    found = certify(given.folder, given.model, given.dataset)
    print(json.dumps(found, indent=1))
    return 0 if found["agrees"] is not False and found["equilibrium"] else 1
