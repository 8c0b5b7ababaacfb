"""Compress a tiny random model of each architecture of transformers as users do, and see what becomes of it.

``python -m tests.models.architectures`` appends a line an architecture to build/architectures.jsonl.  Started again, it
goes on after the last line; architectures that are named behind the command are tried again.  Once all have a line they
become results/architectures.json, from which docs/architectures.md is written.
"""

import contextlib
import dataclasses
import io
import json
import logging
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers
import torch
import transformers
from transformers.models.auto import modeling_auto

import nashswarm
from nashswarm import cli
from nashswarm.models import architecture
from nashswarm.packed.native_forward import plain_class
from tests.conftest import VOCABULARY, sentences
from tests.models.tiny_configs import tiny_model

NEW_TOKENS, PROMPT, LENGTH = 5, 8, 24
TOGETHER = 16  # models that one new process opens
ROOT = pathlib.Path(__file__).parents[2]
LINES, RESULTS = ROOT / "build/architectures.jsonl", ROOT / "results/architectures.json"
PAGE = ROOT / "docs/architectures.md"
BITS = 9.0  # so that towers at 16 bits leave room
MORE_BITS = {"got_ocr2": 15.5, "phi4_multimodal": 12.0, "neomme": 12.5}  # whose towers have sizes of their own
MAPPINGS = {
    "causal": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "classifier": ("AutoModelForSequenceClassification", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "masked": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
}
ONLY: dict[tuple[str, str], dict[str, Any]] = {("reformer", "masked"): {"is_decoder": False}}  # settings of a purpose
CANNOT_RUN = {  # in transformers itself, from a config of this kind
    "blt": "its hashed embeddings have a fixed size of millions of rows, or its own patcher has no config",
    "dbrx": "its configs name no rope_theta, which its attention asks for",
    "dots3_note": "its settings by layer are of 42 layers, however many it has",
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "it drafts for another model, whose states it needs",
    "gemma4_unified_assistant": "it drafts for another model, whose states it needs",
    "layoutlmv2": "it needs the package detectron2",
    "musicgen": "it has no config of its own: it is made from those of three models",
    "musicgen_melody": "it has no config of its own: it is made from those of three models",
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of an architecture: ``compressed``, ``refused`` or ``cannot run``, and why."""

    kind: str
    purpose: str
    name: str
    result: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The command line with a tokenizer and a text to calibrate on."""

    tokenizer: Any
    text: pathlib.Path

    def check(self, model: Any, path: pathlib.Path) -> None:
        """Compress a model, certify it and open it.  Raises AssertionError if one of these fails."""
        full = path.with_name(f"{path.name}-full")
        model.save_pretrained(full)
        self.tokenizer.save_pretrained(full)
        windows = [
            "--no-verify",
            "--windows",
            "4",
            "--length",
            str(LENGTH),
            "--calibration",
            self.text,
            "--cache",
            path / "cache",
        ]
        out = path / "small"
        status, said = command(
            "compress", full, "--out", out, "--effort", "quick", "--bits", str(bits_for(model)), *windows
        )
        assert status == 0, f"the command line: {said[-300:]}"
        assert plain_class(opened := open_model(out)) is type(model), (
            f"the command line makes a {type(opened).__name__}"
        )
        status, said = command("certify", out)
        assert json.loads(said[said.index("{") :])["agrees"], f"is not certified: {said[-300:]}"


def all_kinds() -> list[tuple[str, str]]:
    """Return architecture and purpose of every model of transformers that reads text."""
    return [(kind, purpose) for purpose, (_, names) in MAPPINGS.items() for kind in names]


def try_all(
    kinds: Sequence[tuple[str, str]], folder: pathlib.Path, command_line: CommandLine | None
) -> Iterator[Trial]:
    """Compress models, save them, and open them all again in one new process.

    ``command_line``: also compress and certify them by it.
    """
    waiting: dict[str, tuple[Trial, Any]] = {}
    for kind, purpose in kinds:
        if kind in CANNOT_RUN:
            yield Trial(kind, purpose, kind, "cannot run", CANNOT_RUN[kind])
            continue
        trial = Trial(kind, purpose, kind, "failed")
        try:
            wanted = ONLY.get((kind, purpose), {})
            model = tiny_model(kind, getattr(transformers, MAPPINGS[purpose][0]), **wanted)
            trial = dataclasses.replace(trial, name=type(model).__name__)
            path = folder / f"{kind}-{purpose}"
            waiting[str(path)] = trial, _compress(model, path)
            if command_line is not None:
                command_line.check(model, folder / f"{kind}-{purpose}-command")
        except Exception as error:  # whatever it is, it is told beside the others
            refused = isinstance(error, ValueError) and "\n" not in str(error)
            reason = str(error) if refused else f"{type(error).__name__}: {error}"
            waiting.pop(str(folder / f"{kind}-{purpose}"), None)
            yield dataclasses.replace(trial, result="refused" if refused else "failed", reason=reason)
    opened = open_in_new_process(list(waiting)) if waiting else {}
    for path, (trial, expected) in waiting.items():
        again = opened[path]
        reason = again if isinstance(again, str) else "" if _equal(again, expected) else "opens with other values"
        yield dataclasses.replace(trial, result="failed" if reason else "compressed", reason=reason)


def _compress(model: Any, path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Compress a model, save it, and return what it answers."""
    tokens = torch.randint(3, 300, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    small, report = nashswarm.compress(model, calibration=tokens, bits=bits_for(model), effort="quick")
    small.save_pretrained(path)
    size = sum(file.stat().st_size for file in (path / "model.safetensors", path / "config.json"))
    assert plain_class(small) is type(model) and report.bytes_file == size, "has other bytes than it says"
    return answer(small)


def bits_for(model: Any) -> float:
    """Return the bits to compress a tiny model to."""
    return MORE_BITS.get(model.config.model_type, BITS)


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def command(*words: Any) -> tuple[int, str]:
    """Run nashswarm with these words: exit status, and what it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = cli.main([str(word) for word in words] + ["--quiet"])
        except Exception as error:  # what a shell would show
            status = 1
            said.write(f"{type(error).__name__}: {error}")
    return status, said.getvalue().strip()


def open_model(folder: str | pathlib.Path) -> Any:
    """Open a compressed model by the class that its config names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model, loading = architecture.class_of(config).from_pretrained(folder, output_loading_info=True)
    lost = {name: keys for name, keys in loading.items() if keys}
    assert not lost, f"opens with {lost}"
    return model


@torch.no_grad()
def answer(model: Any) -> dict[str, torch.Tensor]:
    """Return a model's logits after a few tokens, and if it writes text, its greedy continuation."""
    tokens = torch.randint(3, 300, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    found = {"logits": model(input_ids=tokens).logits}
    if model.can_generate():
        settings = transformers.GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, bos_token_id=0, pad_token_id=0, eos_token_id=None
        )
        found["text"] = model.generate(tokens, generation_config=settings)
    return found


def open_in_new_process(folders: Sequence[str]) -> dict[str, Any]:
    """Return ``answer`` of each model as another process finds them, or what it failed with."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        script = (
            f"from tests.models import architectures; architectures.write_answers({list(folders)!r}, {file.name!r})"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, Any] = torch.load(file.name)
        return found


def write_answers(folders: Sequence[str], file: str) -> None:
    """Write ``answer`` of the model in each folder to a file."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for folder in folders:
        try:
            found[folder] = answer(open_model(folder))
        except Exception as error:
            found[folder] = f"{type(error).__name__}: {error}"
    torch.save(found, file)


def write_results(trials: Sequence[Trial]) -> None:
    """Write what became of every architecture, one a line, with the version of transformers."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(trial), ensure_ascii=False) for trial in trials)
    RESULTS.write_text(f'{{"transformers": "{transformers.__version__}", "trials": [\n{lines}\n]}}\n')


def read_results() -> tuple[str, list[Trial]]:
    """Return the version of transformers, and what became of every architecture."""
    content = json.loads(RESULTS.read_text())
    return content["transformers"], [Trial(**trial) for trial in content["trials"]]


def page() -> str:
    """Return a page that says what became of every architecture, as Markdown."""
    version, trials = read_results()
    titles = {"causal": "Language models", "classifier": "Classifiers of text", "masked": "Masked language models"}
    lines = [
        "# Supported architectures",
        "",
        "<!-- written by python -m tests.models.architectures from results/architectures.json -->",
        "",
        f"A tiny random model of every architecture of `transformers {version}` that reads text was compressed, in "
        "Python and by the command line, saved, opened again in another process, and certified. Its logits are equal "
        "bit by bit, and so is the text that it writes. `make test-all` does all of this again, `make test` for common "
        "ones. Of a multimodal model the towers stay at 16 bits, and a warning names them. What is refused is refused "
        "in the sentence beside it, before any work.",
    ]
    for purpose, title in titles.items():
        own = [trial for trial in trials if trial.purpose == purpose]
        good = sorted(trial.kind for trial in own if trial.result == "compressed")
        lines += ["", f"## {title}", "", f"{len(good)} of {len(own)}: " + ", ".join(good) + "."]
        for result, what in (
            ("refused", "Refused"),
            ("cannot run", "Transformers itself cannot run"),
            ("failed", "Fail"),
        ):
            if others := [trial for trial in own if trial.result == result]:
                lines += ["", f"{what}:", ""] + [f"- {trial.kind}: {trial.reason.splitlines()[0]}" for trial in others]
    return "\n".join(lines) + "\n"


def padded_tokenizer(text: str) -> Any:
    """Return a small byte-level BPE tokenizer that can pad, trained on a text."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([text], VOCABULARY, show_progress=False, special_tokens=["<|endoftext|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def main(again: Sequence[str]) -> None:
    """Try the architectures that have no line yet, and those named ``again``, and write the page."""
    logging.disable()
    torch.set_num_threads(1)
    LINES.parent.mkdir(exist_ok=True)
    lines = LINES.read_text().splitlines() if LINES.exists() else []
    trials = {(trial.kind, trial.purpose): trial for trial in (Trial(**json.loads(line)) for line in lines)}
    kinds = [key for key in all_kinds() if key not in trials or key[0] in again]
    for first in range(0, len(kinds), TOGETHER):
        with tempfile.TemporaryDirectory() as folder, LINES.open("a") as file:
            (text := pathlib.Path(folder, "text.txt")).write_text(sentences(60, 3))
            command_line = CommandLine(padded_tokenizer(sentences(120, 0)), text)
            for trial in try_all(kinds[first : first + TOGETHER], pathlib.Path(folder), command_line):
                trials[trial.kind, trial.purpose] = trial
                print(trial, flush=True)
                file.write(json.dumps(dataclasses.asdict(trial)) + "\n")
    write_results([trials[key] for key in all_kinds()])
    PAGE.write_text(page())


if __name__ == "__main__":
    main(sys.argv[1:])
