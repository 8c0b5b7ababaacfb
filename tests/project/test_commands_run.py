"""Run the commands of the documentation as they are typed.

Small models and texts replace those that are fetched; windows and steps are few; a sweep runs both ends of every axis.
A command that is not run here has its reason in ``NOT_HERE`` or ``BY_HAND``.
"""

import importlib.util
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments.config import compose
from nashswarm import cli
from tests.conftest import sentences
from tests.project.test_commands import ADDING, COMMANDS, FENCE, GUIDES, ROOT, TRACKED, commands

RUN = "python -m experiments.run"
SMALLER = {  # where the configuration has such a key and the command does not set it
    "dataset.calibration_windows": 6,
    "dataset.holdout_windows": 2,
    "dataset.test_windows": 8,
    "dataset.sequence_length": 32,
    "dataset.training.examples": 64,
    "finetune.steps": 2,
    "model.layers": 1,
    "model.width": 32,
    "model.expert_width": 32,
    "model.context": 32,
    "train_moe.steps": 2,
    "train_moe.warmup": 1,
    "train_moe.price_steps": 1,
    "measure.windows": 4,
    "measure.requests": 4,
    "measure.rounds": 1,
    "measure.repeats": 2,
    "measure.batches": 1,
    "measure.prompt_tokens": 8,
    "measure.new_tokens": 2,
    "measure.context_tokens": 4,
    "measure.quality_windows": 2,
    "hydra.sweeper.trials": 2,
}
LITTLE = ["model=local", "model.path=your-model", "dataset=wikitext2", "dataset.sequence_length=32"]
LITTLE += ["dataset.calibration_windows=6", "dataset.holdout_windows=2"]
BENCHMARKS = {  # what makes them small
    "alone": [*LITTLE, "--bits", "6", "--tokens", "32"],
    "calibration_text": [
        "your-model",
        "--method",
        "gptq",
        "--length",
        "32",
        "--windows",
        "6",
        "8",
        "--test-windows",
        "2",
    ],
    "cost": ["your-model", "--calibration", "your-text/train.txt", "--shapes", "--windows", "4", "--length", "32"],
    "code_game": [*LITTLE, "--widths", "3"],
    "entropy_trellis": [*LITTLE, "--layers", "transformer.h.0.attn.c_proj"],
    "equal_bytes": [*LITTLE, "model.path=wide", "--widths", "3"],
    "flock": [*LITTLE, "--seeds", "2", "--test-windows", "2"],
    "sensitivities": [*LITTLE, "dataset.test_windows=4", "--bits", "6"],
    "serving": ["your-model", "folder", "--requests", "4", "--others", "2", "--texts", "3", "--long", "9"],
    "stages": [*LITTLE, "method.sweeps=1"],
    "trained_mixtures": ["--models", "mixtral", "--steps", "2", "--vocabulary", "300", "--windows", "4", "--bits", "4"],
    "trellis_and_lattice": [*LITTLE, "dataset.test_windows=4", "--bits", "6"],
}
NOT_HERE = {  # what a command begins with → why it is not run here
    "apt-get install ": "needs a download",
    "pip install ": "needs a download",
    "PIP_EXTRA_INDEX_URL=": "needs a download",
    ".venv/bin/pre-commit install": "needs a download",
    "wandb sync ": "needs an account",
    "jupyter lab ": "opens a browser; tests/project/test_notebooks.py runs what is in them",
    "make ": "has a test below",
    "cp ": "the walk of CONTRIBUTING.md has a test below",
    "sed -i ": "the walk of CONTRIBUTING.md has a test below",
    "python -m tests.models.architectures": "it takes an hour; test_architectures.py tries the common ones",
    "pytest ": "the walk of CONTRIBUTING.md has a test below",
    "git add ": "the walk of CONTRIBUTING.md has a test below",
    "grep -rl _owner_": "has a test below",
    "python scripts/": "runs on the committed records in tests/reporting/test_derive.py, on runs of its own below",
    "python -m experiments.mirror ": "runs in tests/experiment/test_run.py",
    "nashswarm chat ": "waits for somebody to type; tests/runtime/serving/test_chat.py talks",
    "nashswarm profile your-model-3bit --misses": "simulates for minutes; tests/runtime/test_cache_misses.py counts",
    "nashswarm profile folder --misses": "simulates for minutes; tests/runtime/test_cache_misses.py counts",
}
BY_HAND = {  # benchmarks → what they take; their committed reports tell the code that was measured
    "decoding": "a llama.cpp, and a trained model",
    "encoder": "the model of a package",
    "expert_prices": "a trained mixture of experts",
    "export": "GPT-2 at its own size",
    "flock_dynamics": "the embedded model at its own size",
    "ggml_kernels": "a llama.cpp, and an idle machine",
    "gguf_files": "a llama.cpp with its tools",
    "kernels": "an idle machine",
    "larger": "13 GB of disk",
    "misses": "hours of simulation",
    "optima": "programmes over the blocks of the embedded model",
    "residency": "a trained mixture of experts, and a disk",
    "rotation": "a trained GPT-2",
    "sweeps": "an idle machine",
}
TARGETS = {  # of make → a file that runs it, or what it runs
    "quickstart": (".github/workflows/ci.yml", "run: make quickstart"),
    "test": (".github/workflows/ci.yml", "run: make test"),
    "docs": (".github/workflows/ci.yml", "run: make docs"),
    "arxiv": (".github/workflows/ci.yml", "run: make arxiv"),
    "paper": ("Makefile", "arxiv: paper"),
    "install": (".github/workflows/release.yml", "run: make install"),
    "derive": ("tests/reporting/test_derive.py", "tables.main, audit.main, resources.main"),
    "family": ("tests/experiment/test_run.py", "train_default_model.main("),
    "reproduce": ("tests/reporting/test_reproduced.py", "reproduced.main("),
    "test-slow": ("Makefile", "test-all: test docs sanitize test-slow test-engines"),
    "test-engines": ("Makefile", "test-all: test docs sanitize test-slow test-engines"),
    "test-all": ("CONTRIBUTING.md", "`make test-all`, then"),
}


def is_a_name(command: str) -> bool:
    """``nashswarm certify`` in prose names the subcommand; ``python -m experiments.run`` is one."""
    return command.startswith("nashswarm ") and all(word.startswith("--") for word in command.split()[2:])


TYPED = sorted({command for _, command in COMMANDS if not is_a_name(command)})
RUNS = [command for command in TYPED if RUN in command]
HERE = [command for command in TYPED if not command.startswith(tuple(NOT_HERE))]


def benchmark(command: str) -> str | None:
    match = re.match(r"python -m experiments\.benchmarks\.(\w+)", command)
    return match and match.group(1)


@pytest.mark.parametrize("command", HERE)
def test_command_is_run_or_names_why_not(command: str) -> None:
    name = benchmark(command)
    if name in BY_HAND:
        reports = [json.loads(path.read_text()) for path in (ROOT / "results/benchmarks").glob(f"{name}*.json")]
        assert reports and all(re.fullmatch(r"\w{40}", one["provenance"]["commit"]) for one in reports), name
    else:
        assert command in RUNS or name in BENCHMARKS or command.startswith("nashswarm "), command


@pytest.mark.parametrize("target", sorted({command.split()[1] for command in TYPED if command.startswith("make ")}))
def test_make_target_is_run_by_something(target: str) -> None:
    if target == "pages":
        return  # below
    path, text = TARGETS[target]
    assert text in (ROOT / path).read_text(), f"make {target}: {path}"


# in the places of what is fetched


OF_OTHER_SIZE = {  # `nashswarm profile` takes dozens of steps; some methods have groups of 128 columns
    "your-model": {"n_positions": 128},
    "wide": {"n_embd": 128},
}


@pytest.fixture(scope="module")
def stand_ins(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, random_model: Callable[[str], Any]
) -> pathlib.Path:
    """A folder with small models, texts and examples of GLUE."""
    folder = tmp_path_factory.mktemp("stand-ins")
    names = ["your-model", "folder", "other_folder", *(f"family/default_{size}" for size in ("xs", "s", "m", "l"))]
    kinds = {"wide": "gpt2", "llama": "llama", "opt": "opt", "encoder": "bert_encoder", **dict.fromkeys(names, "gpt2")}
    for name, kind in kinds.items():
        model = random_model(kind)
        if name in OF_OTHER_SIZE:
            config = transformers.GPT2Config(**model.config.to_dict() | OF_OTHER_SIZE[name])
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("texts", "your-text", "file_or_folder"):
        (folder / name).mkdir()
        for seed, split in enumerate(("train", "validation", "test")):
            (folder / name / f"{split}.txt").write_text(sentences(3000, seed), encoding="utf-8")
    lines = sentences(200, 5).replace("\n\n", "\n").splitlines()
    for task, columns in {"sst2": ("sentence",), "cola": ("sentence",), "mrpc": ("sentence1", "sentence2")}.items():
        (folder / task).mkdir()
        for split, first in {"train": 0, "validation": 100}.items():
            rows = [dict.fromkeys(columns, line) | {"label": number % 2} for number, line in enumerate(lines)]
            text = "".join(json.dumps(row) + "\n" for row in rows[first : first + 100])
            (folder / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def place(stand_ins: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder to type in: every stand-in lies there."""
    for one in stand_ins.iterdir():
        (tmp_path / one.name).symlink_to(one)
    return tmp_path


@pytest.fixture
def variables(stand_ins: pathlib.Path) -> dict[str, str]:
    """The environment in which what would be fetched lies here, and no run takes the threads of another."""
    lies = {
        **dict.fromkeys(("GPT2", "STORY_WRITER"), "your-model"),
        **dict.fromkeys(("WIKITEXT2", "WIKITEXT2_RAW", "STORIES"), "texts"),
        **{f"GLUE_{task.upper()}": task for task in ("sst2", "cola", "mrpc")},
        "OPT_125M": "opt",
        "FAMILY": "family",
    }
    named = {f"NASHSWARM_{name}": str(stand_ins / path) for name, path in lies.items()}
    return os.environ | named | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def typed(words: list[str], cwd: pathlib.Path, environment: dict[str, str], failing: bool = False) -> None:
    """Runs Python with these words; a traceback or, unless it may be ``failing``, a status but 0 is an error."""
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    said = done.stdout[-2000:] + done.stderr[-2000:]
    assert (failing or done.returncode == 0) and "Traceback" not in done.stderr, said


# experiments.run

LARGE = {  # choice → stand-in
    **dict.fromkeys(("default", "gpt2_random", "smollm2_135m"), "your-model"),
    "minilm": "encoder",
}
ABSENT = object()


def made_small(words: list[str]) -> list[str]:
    """The words of a command with stand-ins in the places of large models, and with what makes the run short."""
    if "--help" in words:
        return words
    parsed = OverridesParser.create().parse_overrides([word for word in words if "=" in word])
    swept = {one.key_or_group for one in parsed if one.is_sweep_override()}
    first = [
        f"{one.key_or_group}={next(one.sweep_string_iterator())}" if one.key_or_group in swept else one.input_line
        for one in parsed
        if not one.key_or_group.startswith("hydra.")
    ]
    added = f"hydra.searchpath=[file://{ROOT / 'examples/adding/conf'}]"
    config = compose(added, *first, return_hydra_config=True)
    choices = config.hydra.runtime.choices
    axes = swept | set(config.hydra.sweeper.params or {})
    more = ["wandb=disabled"]
    stand_in = None if "model" in axes else LARGE.get(choices["model"])
    if stand_in:
        words = [word for word in words if not word.startswith("model=")]
        more += ["model=local", f"model.path={stand_in}"]
    if choices["dataset"] == "stdlib_docs" and not any(word.startswith("dataset=") for word in words):
        more.append("dataset=wikitext2")
    for key, value in SMALLER.items():
        of_another = stand_in and key.startswith("model.")
        if not of_another and key not in axes and OmegaConf.select(config, key, default=ABSENT) is not ABSENT:
            more.append(f"{key}={value}")
    if "trials" not in config.hydra.sweeper:
        for key, values in (config.hydra.sweeper.params or {}).items():
            ends = [value.strip() for value in str(values).split(",")]
            if len(ends) > 2 and not any(key in word for word in words):
                more.append(f"{key}={ends[0]},{ends[-1]}")
    return [*words, *more]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS, ids=lambda command: command.removeprefix(RUN).strip()[:70] or "alone")
def test_run_of_the_guides_ends_well(
    command: str, place: pathlib.Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NASHSWARM_FAMILY", variables["NASHSWARM_FAMILY"])  # `made_small` reads paths that name it
    pages = [page for page, other in COMMANDS if other == command]
    steps = [command]
    if "path=trained" in command:  # by what the page says just before
        steps.insert(0, next(other for other in commands(GUIDES[pages[0]]) if "save=trained" in other))
    for step in steps:
        words = shlex.split(step)
        while re.match(r"[A-Z_0-9]+=", words[0]):  # the variables are set to stand-ins
            words.pop(0)
        words = words[3:]
        if any(page.startswith(ADDING) for page in pages) and "--config-dir" not in words:
            words = ["--config-dir", "examples/adding/conf", *words]
        words = [str(ROOT / word) if word == "examples/adding/conf" else word for word in words]
        typed(["-m", "experiments.run", *made_small(words)], place, variables, failing=bool(absent()))
    if "--help" in command:
        return
    outcomes = [json.loads(path.read_text()) for path in place.glob("results/logs/**/outcome.json")]
    failed = [outcome["message"] for outcome in outcomes if outcome["status"] == "failed"]
    assert all("pip install" in message for message in failed), failed
    assert [*place.glob("results/records/*/*.json"), *place.glob("build/records/*/*.json")]


def absent() -> list[str]:
    """Libraries that `experiment=main` compares with and that are not installed here."""
    peers = ("auto_round", "bitsandbytes", "gguf", "hqq", "nncf", "onnxruntime", "optimum")
    return [name for name in peers if importlib.util.find_spec(name) is None]


# benchmarks


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_benchmark_on_small_inputs_writes_its_report(name: str, place: pathlib.Path, variables: dict[str, str]) -> None:
    out = ["--out", str(place / "report")]
    if name in ("equal_bytes", "flock"):
        out += ["--records", str(place / "records")]
    typed(["-m", f"experiments.benchmarks.{name}", *BENCHMARKS[name], *out], place, variables)
    assert list(place.glob("report*.json"))


# make, and what is said of a release


@pytest.mark.slow
def test_make_pages_writes_a_page_for_each_experiment(place: pathlib.Path) -> None:
    dry = ["make", "--just-print", "--assume-old=.venv/installed", "pages"]
    commands_of_make = subprocess.check_output(dry, cwd=ROOT, text=True)
    script = shlex.split(commands_of_make.splitlines()[-1])[1:]
    typed([*script, "--out", str(place / "pages")], ROOT, dict(os.environ))
    experiments = {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")}
    assert experiments <= {path.stem for path in (place / "pages").glob("*.html")}


def test_release_command_replaces_the_address(tmp_path: pathlib.Path) -> None:
    (command,) = [command for command in TYPED if command.startswith("grep -rl _owner_")]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("_owner_" in text for text in texts) and any("github.com/account/name" in text for text in texts)


# nashswarm

BLOCK = next(block for _, block in FENCE.findall(GUIDES["README.md"]) if "nashswarm rebudget" in block)
LINES = [re.sub(r"\s+#.*", "", line) for line in BLOCK.splitlines()]
OTHERS = [command for command in HERE if command.startswith("nashswarm ") and command not in LINES]


@pytest.mark.slow
def test_nashswarm_commands_run_one_after_the_other(
    place: pathlib.Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the README's block in its order, then the commands of the other pages on the folders that it left."""
    assert len(LINES) == 9 and len(OTHERS) >= 4
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.chdir(place)
    for number, line in enumerate([*LINES, *OTHERS]):
        words = shlex.split(line)[1:]
        if "--by-layer" in words:
            words[1] = "llama"
        elif words[1] == "folder":
            words[1] = "your-model-3bit"
        if "--out" in words and number >= len(LINES):
            words[words.index("--out") + 1] += str(number)
        if "--memory-mb" in words:  # what a process holds before any model is the machine's
            words[words.index("--memory-mb") + 1] = "4000"
        if words[0] == "serve":
            answers(words)
            continue
        lacking = words[0] == "export" and not all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript")))
        assert cli.main(words) == (2 if lacking else 0), line
    for folder in ("your-model-3bit", "small", "smaller"):
        tokens = torch.tensor([[1, 2, 3]])
        loaded = transformers.AutoModelForCausalLM.from_pretrained(place / folder)
        assert loaded(input_ids=tokens).logits.isfinite().all(), folder


def answers(words: list[str]) -> None:
    """Start the server, complete a prompt, and stop it."""
    command = [sys.executable, "-c", "import sys; from nashswarm.cli import main; sys.exit(main())", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    body = json.dumps({"prompt": "the quiet flock", "max_tokens": 3}).encode()
    request = urllib.request.Request("http://127.0.0.1:8765/v1/completions", body, {"Content-Type": "application/json"})
    with subprocess.Popen([*command, "--port", "8765"], env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said = list(itertools.takewhile(lambda line: "Started server process" not in line, server.stderr))
            assert any("127.0.0.1:8765" in line for line in said), "the server never came up"
            for patience in range(20, -1, -1):  # it listens a moment later
                try:
                    with urllib.request.urlopen(request, timeout=60) as reply:
                        assert json.load(reply)["choices"][0]["text"]
                    break
                except urllib.error.URLError:
                    if not patience:
                        raise
                    time.sleep(0.5)
        finally:
            server.terminate()


@pytest.mark.slow
def test_quick_start_leads_to_a_table(tmp_path: pathlib.Path) -> None:
    (block,) = [block for language, block in FENCE.findall(GUIDES["docs/quickstart.md"]) if language == "sh"]
    first, second = (shlex.split(line)[1:] for line in block.splitlines())
    folders = [f"{name}={tmp_path}/{name}" for name in ("records", "cache")]
    few = [f"dataset.{name}" for name in ("calibration_windows=6", "holdout_windows=2", "test_windows=4")]
    added = [*folders, *few, "dataset.sequence_length=64", f"hydra.run.dir={tmp_path}/logs", "wandb=disabled"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for words in ([*first, *added], [*second, "--records", f"{tmp_path}/records", "--out", f"{tmp_path}/tables"]):
        subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)
    assert re.search(r"^\| nash_swarm\[bits=2\.5\]‡? \|", (tmp_path / "tables/single.md").read_text(), re.M)


@pytest.mark.slow
def test_walk_of_contributing_leads_to_a_row_at_equal_bytes(
    tmp_path: pathlib.Path, variables: dict[str, str], stand_ins: pathlib.Path
) -> None:
    """In a copy of the repository, with a small model and text in place of the embedded ones."""
    for path in TRACKED:
        if not path.startswith(("results/", "docs/", "paper/")) and (ROOT / path).exists():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tmp_path / path)
    block = next(block for _, block in FENCE.findall(GUIDES["CONTRIBUTING.md"]) if "nashswarm/methods/ends.py" in block)
    small = ["model=local", f"model.path={stand_ins / 'your-model'}", "dataset=wikitext2", "wandb=disabled"]
    small += [f"dataset.{name}" for name in ("calibration_windows=6", "holdout_windows=2", "test_windows=8")]
    small += ["dataset.sequence_length=32"]
    author = {f"GIT_{role}_{part}": "nobody" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    environment = variables | author | {"PYTHONPATH": str(tmp_path)}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    for line in block.splitlines():
        more = " ".join(map(shlex.quote, small)) if RUN in line else ""
        command = f"{re.sub(r' +#.*', '', line)} {more}"
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    table = (tmp_path / "build/tables/equal_bytes.md").read_text()
    assert re.search(r"\| ends \|.*\| \d\.\d+ \[", table), table
