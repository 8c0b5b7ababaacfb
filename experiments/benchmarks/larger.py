"""A LLaMA of three billion random weights, compressed by layer within 6 GiB, killed once and gone on with:

    python -m experiments.benchmarks.larger

The checkpoint is written to the disk in files of at most 2 GB and deleted afterwards, with what was made of it.  The
command, and the process that loads the result and generates, run under a limit of the kernel's on private memory
(RLIMIT_DATA, which counts the mapped files of a checkpoint too); their resident sets are watched beside it.  Random
weights say nothing of quality: this is about time, bytes and memory.  Beside what was measured stands what the plan had
said, and what it says of larger models.
"""

import argparse
import datetime
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
import transformers

from nashswarm.methods.streaming import shards
from nashswarm.models import shapes
from nashswarm.models.sources import CONFIG, EMBEDDED
from nashswarm.records.files import write_report
from nashswarm.records.provenance import provenance

OUT = pathlib.Path("results/benchmarks/larger")
CONFIGURED: dict[str, Any] = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
FILE_BYTES = 2 * 10**9
LIMIT = 6 << 30  # bytes
KILLED_AT = 0.5  # of the blocks
INTO_A_BLOCK = 10.0  # seconds
NEW_TOKENS = 16
COMMAND = [sys.executable, "-c", "import sys; from nashswarm.cli import main; sys.exit(main())"]
GENERATE = f"""
import json, sys, time
import torch, transformers
import nashswarm
from nashswarm import memory
started = time.monotonic()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
loaded = time.monotonic()
tokens = transformers.AutoTokenizer.from_pretrained(sys.argv[1])("The flock", return_tensors="pt")
answer = model.generate(**tokens, max_new_tokens={NEW_TOKENS}, min_new_tokens={NEW_TOKENS}, do_sample=False)
ended = time.monotonic()
new = answer.shape[1] - tokens["input_ids"].shape[1]
print(json.dumps({{"load_seconds": loaded - started, "generate_seconds": ended - loaded, "new_tokens": new,
                   "tokens": answer[0].tolist(), "peak_bytes": memory.peak_bytes()}}))
"""


def main() -> None:
    """Write, compress, kill, go on, load, generate, save and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/nashswarm-larger"), help="13 GB free")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sweeps", type=int, default=0)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    full, small = options.folder / "full", options.folder / "small"
    if not (full / CONFIG).is_file():
        write(full)
    words = ["compress", str(full), "--windows", str(options.windows), "--length", str(options.length)]
    words += ["--sweeps", str(options.sweeps), "--method", "gptq"]
    planned = json.loads(command([*words, "--plan", "--by-layer"]))
    words += ["--by-layer", "--out", str(small)]
    blocks = CONFIGURED["num_hidden_layers"] + 2
    at = int(KILLED_AT * blocks)
    first = watched([*COMMAND, *words], small.with_name("small.unfinished"), at)
    second = watched([*COMMAND, *words])
    compressed = json.loads(second.pop("printed"))
    loaded = watched([sys.executable, "-c", GENERATE, str(small)])
    generated = json.loads(loaded.pop("printed"))
    about = json.loads((small / "nashswarm.json").read_text())
    larger = {}
    for name in shapes.LARGE:
        larger[name] = json.loads(command(["compress", name, "--plan", "--by-layer", "--method", "gptq"]))
    content = {
        "model": CONFIGURED,
        "bytes_full": sum(path.stat().st_size for path in full.iterdir()),
        "limit_bytes": LIMIT,
        "limited_by": "RLIMIT_DATA",
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "settings": about["key"]["settings"],
        "windows": [options.windows, options.length],
        "planned": planned,
        "compressed": compressed,
        "killed": first,
        "resumed": second,
        "generated": generated | loaded,
        "units": about["units"],
        "larger": larger,
        "provenance": provenance(started),
    }
    write_report(options.out, content, as_table(content))
    shutil.rmtree(options.folder)
    print(as_table(content))


def write(folder: pathlib.Path) -> None:
    """Write the checkpoint, file by file, and the config last."""
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(**CONFIGURED)
    expected = shards.tensors_of(shards.skeleton(config))
    files: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, part in expected.items():
        size += 2 * part.numel()
        if size > FILE_BYTES:
            files.append({})
            size = 2 * part.numel()
        files[-1][name] = part.shape
    generator = torch.Generator().manual_seed(0)
    for path, tensor_shapes in zip(shards.file_names(len(files)), files, strict=True):
        tensors = {
            name: (torch.randn(shape, generator=generator) * config.initializer_range).bfloat16()
            if len(shape) == 2
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in tensor_shapes.items()
        }
        safetensors.torch.save_file(tensors, folder / path, {"format": "pt"})
    weight_map = {
        name: path for path, names in zip(shards.file_names(len(files)), files, strict=True) for name in names
    }
    total = sum(2 * part.numel() for part in expected.values())
    (folder / shards.INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    transformers.AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)


def command(words: Sequence[str]) -> str:
    """Run a command of nashswarm and return what it prints."""
    return subprocess.run([*COMMAND, *words], stdout=subprocess.PIPE, text=True, check=True).stdout


def watched(words: Sequence[str], folder: pathlib.Path | None = None, units: int = 0) -> dict[str, Any]:
    """Run a command under the memory limit; return its seconds, its largest resident set in bytes and its output.

    With a ``folder``, kill the process some seconds after ``units`` blocks are finished there.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))

    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=limit)
    peak, killed, reached = 0, False, None
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        if folder is not None and reached is None and _finished(folder) >= units:
            reached = time.monotonic()
        if reached is not None and not killed and time.monotonic() - reached > INTO_A_BLOCK:
            process.send_signal(signal.SIGKILL)
            killed = True
        time.sleep(0.1)
    assert process.stdout is not None
    seconds = time.monotonic() - started
    if process.returncode != (-signal.SIGKILL if folder is not None else 0):
        raise SystemExit(f"the process ended with {process.returncode}")
    measurements: dict[str, Any] = {"seconds": seconds, "resident_bytes": peak, "status": process.returncode}
    if folder is not None:
        return measurements | {"units_finished": _finished(folder)}
    return measurements | {"printed": process.stdout.read()}


def _resident(process: int) -> int:
    try:
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def _finished(folder: pathlib.Path) -> int:
    try:
        return len(json.loads((folder / "nashswarm.json").read_text())["units"])
    except OSError:
        return 0


def as_table(content: dict[str, Any]) -> str:
    """Return a Markdown table of measurements beside the plan, and the plans of larger models."""
    compressed, planned, generated = content["compressed"], content["planned"], content["generated"]
    killed, resumed = content["killed"], content["resumed"]
    gib = 1 << 30
    peak = max(compressed["peak_bytes"], killed["resident_bytes"], resumed["resident_bytes"])
    rows = [
        ("parameters", f"{compressed['parameters']:,}", f"{planned['parameters']:,}"),
        ("bytes before", f"{content['bytes_full']:,}", ""),
        ("bytes after", f"{compressed['bytes_file']:,}", f"{planned['bytes_file']:,}"),
        ("bits per parameter", f"{compressed['bits_per_weight_model']:.3f}", f"{planned['bits_per_weight_model']:.3f}"),
        ("limit of private memory, GiB", f"{content['limit_bytes'] / gib:.2f}", ""),
        ("largest resident set, GiB", f"{peak / gib:.2f}", f"{planned['peak_bytes'] / gib:.2f}"),
        (
            "minutes of a core in finished blocks",
            f"{compressed['cpu_seconds'] / 60:.1f}",
            f"{planned['seconds'] / 60:.1f}",
        ),
        ("minutes in them, while others worked too", f"{compressed['seconds'] / 60:.1f}", ""),
        ("minutes until SIGKILL", f"{killed['seconds'] / 60:.1f}", ""),
        ("units finished then", f"{killed['units_finished']} of {len(content['units'])}", ""),
        ("minutes from there to the end", f"{resumed['seconds'] / 60:.1f}", ""),
        ("seconds to load the result", f"{generated['load_seconds']:.1f}", ""),
        (f"seconds for {generated['new_tokens']} tokens", f"{generated['generate_seconds']:.1f}", ""),
        ("largest resident set then, GiB", f"{generated['resident_bytes'] / gib:.2f}", ""),
    ]
    lines = ["|  | measured | planned |", "| :-- | --: | --: |", *(f"| {' | '.join(row)} |" for row in rows)]
    slower = compressed["cpu_seconds"] / planned["seconds"]
    lines += [
        "",
        f"Plans on {content['threads']} thread; in the last column times {slower:.2f}, as measured above:",
        "",
    ]
    lines += ["| model | parameters | GB after | bits | hours | GiB of memory | hours, corrected |"]
    lines += ["| :-- | --: | --: | --: | --: | --: | --: |"]
    for name, plan in content["larger"].items():
        hours = plan["seconds"] / 3600
        lines.append(
            f"| `{name}` | {plan['parameters']:,} | {plan['bytes_file'] / 1e9:.2f} "
            f"| {plan['bits_per_weight_model']:.3f} | {hours:.1f} | {plan['peak_bytes'] / gib:.1f} "
            f"| {slower * hours:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
