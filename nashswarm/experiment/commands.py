"""The commands that make compressed models or check them: compress, rebudget and certify.

Each function takes the parsed command line, prints one JSON object and returns the exit status.  All raise ValueError
or OSError in one sentence for what the user can mend.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from nashswarm import api
from nashswarm.calibration.texts import COLUMN
from nashswarm.data import corpus
from nashswarm.experiment import certify as certificates
from nashswarm.experiment import forecast, plan, run, streaming, texts, typed_export
from nashswarm.measures.size import Size
from nashswarm.methods.nash_swarm.settings import NashSwarm
from nashswarm.methods.streaming.settings import ByLayer, ByPrice
from nashswarm.models import architecture, sources
from nashswarm.packed import model_folder
from nashswarm.records.record import Record

DEFAULT_BITS = 3.0  # of a folder, where nothing else is said


def compress(arguments: argparse.Namespace) -> int:
    """Compress a model into a folder or a GGUF file, or forecast what that takes, and print the result."""
    if arguments.to is not None:
        _check_typed(arguments)
    elif arguments.target_size is not None or arguments.types is not None:
        raise ValueError("--target-size and --types go with --to gguf and --to compressed-tensors; say --bits instead")
    arguments.bits = DEFAULT_BITS if arguments.bits is None and arguments.to is None else arguments.bits
    if arguments.plan and not arguments.by_layer:
        return _print(_forecast(arguments))
    if arguments.plan:
        by_layer = _by_layer(arguments)  # which also sets the windows
        return _print(streaming.forecast_by_layer(arguments.model, by_layer, arguments.windows, arguments.length))
    if arguments.out is None:
        raise ValueError("say with --out where the compressed model is to go")
    if arguments.by_layer:
        full, out, settings = pathlib.Path(arguments.model), arguments.out, _by_layer(arguments)
        text = texts.choose(_calibration(arguments), arguments.model, own=False)
        numbers = (arguments.windows, arguments.length, arguments.seed)
        return _print({"folder": str(out)} | streaming.compress_by_layer(full, out, text, settings, *numbers))
    if arguments.head_bits is not None or arguments.sweeps:
        raise ValueError("--head-bits and --sweeps go with --by-layer")
    given = pathlib.Path(arguments.model)
    path = None if arguments.model == "default" else str(given.resolve()) if given.exists() else arguments.model
    source, method = sources.ModelSource(path, exclude=list(arguments.exclude)), arguments.method or "nash_swarm"
    sources.check_location(source)
    held_out = None if arguments.windows is None else max(-(-arguments.windows // 3), 1)
    length = api.window_length(path or str(sources.EMBEDDED)) if arguments.length is None else arguments.length
    dataset = texts.choose(
        _calibration(arguments), path, sources.writes_text(source), calibration_windows=arguments.windows,
        holdout_windows=held_out, sequence_length=length,
    )  # fmt: skip
    cache = arguments.cache.expanduser().resolve()
    chosen = (
        api.method_of(method, arguments.bits, arguments.effort)
        if arguments.to is None
        else typed_export.method_of(arguments.to, arguments.types)
    )
    config = plan.config_of(
        source, chosen, dataset, Size(), seed=arguments.seed, save=str(arguments.out), cache=str(cache),
        records=str(cache / "records"),
    )  # fmt: skip
    if arguments.to is not None:
        return _print(typed_export.compress(config, arguments.out, arguments.target_size, arguments.bits))
    labels = {"model": source.label, "method": method, "dataset": dataset.label, "measure": "size"}
    return _print_record(run.run(config, labels, verify=not arguments.no_verify).record, arguments.out)


def _forecast(arguments: argparse.Namespace) -> dict[str, Any]:
    method = api.method_of(arguments.method or "nash_swarm", arguments.bits, arguments.effort)
    if not isinstance(method, NashSwarm) or arguments.exclude:
        raise ValueError(
            "--plan forecasts nash_swarm without --exclude, or --by-layer: leave --method and --exclude out"
        )
    config = forecast.config_of(arguments.model)
    length = min(arguments.length or api.LONGEST_WINDOW, architecture.max_tokens(config) or api.LONGEST_WINDOW)
    windows = corpus.most_windows(method) * 3 // 4 if arguments.windows is None else arguments.windows
    return forecast.forecast(arguments.model, config, method, windows, length)


def _calibration(arguments: argparse.Namespace) -> str | None:
    """Return the source of the calibration text, with the column behind it, if one is given."""
    if arguments.column is None:
        return None if arguments.calibration is None else str(arguments.calibration)
    if arguments.calibration is None:
        raise ValueError("--column goes with --calibration FILE, whose column it names")
    return f"{arguments.calibration}{COLUMN}{arguments.column}"


def _check_typed(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that ``--to`` does not go with, before any work."""
    others = {"--by-layer": arguments.by_layer, "--plan": arguments.plan, "--method": arguments.method}
    others |= {"--effort": arguments.effort != "default"}
    if given := [name for name, value in others.items() if value]:
        raise ValueError(f"--to {arguments.to} does not go with {' and '.join(given)}: leave it out")
    typed_export.check_out(arguments.to, arguments.out)


def export_typed(arguments: argparse.Namespace) -> int:
    """Compress the model that a folder was made of into the types of another runtime, and print the result."""
    typed_export.check_out(arguments.to, arguments.out)
    method = typed_export.method_of(arguments.to, arguments.types)
    about = model_folder.read(arguments.folder).about
    config = plan.config_again(about, {"model": arguments.model, "dataset": arguments.dataset})
    config.method = plan.described(method)
    return _print(typed_export.compress(config, arguments.out, arguments.target_size, arguments.target_bits))


def _by_layer(arguments: argparse.Namespace) -> ByLayer | ByPrice:
    """Return the settings of ``--by-layer``."""
    if arguments.method not in (None, "gptq", "nash_swarm") or arguments.exclude or arguments.effort != "default":
        raise ValueError("--by-layer knows neither --exclude, --effort nor another --method than nash_swarm and gptq")
    arguments.windows = 4 if arguments.windows is None else arguments.windows
    if arguments.windows < 1:
        raise ValueError("--windows must be at least 1")
    if arguments.method != "gptq":
        if arguments.head_bits is not None:
            raise ValueError("--head-bits goes with --by-layer --method gptq; nash_swarm chooses the rates itself")
        return ByPrice(arguments.bits, sweeps=arguments.sweeps)
    if arguments.bits != int(arguments.bits):
        raise ValueError("--bits of --by-layer --method gptq must be the whole number of bits of a weight")
    return ByLayer(int(arguments.bits), arguments.head_bits, sweeps=arguments.sweeps)


def rebudget(arguments: argparse.Namespace) -> int:
    """Compress the model that a folder was made of to another size, and print the result."""
    about = model_folder.read(arguments.folder).about
    paths = {"model": arguments.model, "dataset": arguments.dataset}
    config = plan.config_again(about, paths, bits=arguments.bits, save=str(arguments.out), rerun=False)
    return _print_record(
        run.run(config, about["record"]["labels"], verify=not arguments.no_verify).record, arguments.out
    )


def certify(arguments: argparse.Namespace) -> int:
    """Compute the regret of a compressed model again, print it, and return 1 if it does not agree."""
    _print(certificate := certificates.certify(arguments.folder, arguments.model, arguments.dataset, arguments.tiles))
    return 0 if certificate["agrees"] is not False and certificate["equilibrium"] else 1


def _print(content: Mapping[str, Any]) -> int:
    print(json.dumps(content, indent=1))
    return 0


def _print_record(record: Record, folder: pathlib.Path) -> int:
    names = ("bytes_file", "compression", "bits_per_weight_model", "bits_per_weight", "bytes_resident", "regret_max")
    told = {name: record.metrics[name] for name in names if name in record.metrics}
    return _print({"folder": str(folder)} | told | {"seconds": round(record.metrics["quantize_seconds"], 1)})
