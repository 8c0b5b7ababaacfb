"""Every command of the documentation names programs, options and choices that exist; test_commands_run.py runs them."""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.config import compose
from nashswarm import cli
from nashswarm.experiment import plan

ROOT = pathlib.Path(__file__).parents[2]
TRACKED = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
PAGES = {path: (ROOT / path).read_text() for path in TRACKED if path.endswith(".md") and (ROOT / path).exists()}
GUIDES = {path: text for path, text in PAGES.items() if not path.startswith("results/")}
GUIDES |= {
    path: "\n\n".join("".join(cell["source"]) for cell in json.loads((ROOT / path).read_text())["cells"])
    for path in TRACKED
    if path.startswith("notebooks/") and path.endswith(".ipynb")
}
OF_OTHERS = ("apt-get install ", "wandb sync ", "jupyter lab ", "grep -rl ", ".venv/bin/pre-commit install")
SHELL = ("cp ", "sed -i ", "git add ", "pytest ")  # of the guide to a method: test_commands_run.py follows it
PROGRAMS = ("python ", "make ", "pip ", "nashswarm ", "NASHSWARM_", "PIP_", *OF_OTHERS)
ADDING = ("docs/adding/", "CONTRIBUTING.md")  # their commands use the choices that they have just written
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.S | re.M)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a page, in its shell blocks and in its prose, without comments and line ends."""
    for language, block in FENCE.findall(text):
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                if line := re.sub(r"\s+#.*", "", line).strip():
                    yield line
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text)):
        line = " ".join(code.split())
        if line.startswith(PROGRAMS) and not re.search(r"<\w+>|\|", line.replace("| xargs", "")) and " " in line:
            yield line


COMMANDS = sorted({(path, command) for path, text in GUIDES.items() for command in commands(text)})


@functools.cache
def code() -> str:
    """Everything that may name a variable of the environment."""
    paths = [*ROOT.glob("conf/*/*.yaml"), *ROOT.glob("nashswarm/**/*.py"), ROOT / "Makefile"]
    return "".join(path.read_text() for path in paths)


def test_commands_of_all_programs_are_collected() -> None:
    programs = {command.split()[0] for _, command in COMMANDS}
    assert {"python", "make", "pip", "nashswarm"} <= programs and len(COMMANDS) > 100


@pytest.mark.parametrize("page, command", COMMANDS, ids=lambda value: value.replace("/", "-")[:60])
def test_command_names_what_exists(page: str, command: str) -> None:
    if command.startswith((*OF_OTHERS, *SHELL)):
        return
    variables, words = [], shlex.split(command)
    while words and re.match(r"[A-Z_0-9]+=", words[0]):
        variables.append(words.pop(0).split("=")[0])
    for name in variables:
        assert name in code() or name in ("PIP_EXTRA_INDEX_URL", "NASHSWARM_STORIES", "NASHSWARM_STORY_WRITER"), name
    if words:
        program = words.pop(0)
        assert program in CHECKS, f"{page}: {command}"
        if page.startswith(ADDING) and "experiments.run" in words and "--config-dir" not in words:
            words += ["--config-dir", "examples/adding/conf"]  # what the guide has just written
        CHECKS[program](words)


def check_make(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def check_pip(words: list[str]) -> None:
    assert words.pop(0) == "install"
    for name in words:
        for extra in ",".join(re.findall(r"\[(.*)\]", name)).split(","):
            assert not extra or extra in PYPROJECT["optional-dependencies"], name


def check_nashswarm(words: list[str]) -> None:
    known = cli.build_parser()
    if len(words) == 1 or words[1:] == ["--by-layer"]:  # what the prose calls it
        words = [words[0], "--help"]
    if words[-1] == "--help":
        with pytest.raises(SystemExit, match="0"):
            known.parse_args(words)
    else:
        known.parse_args(words)


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "experiments.run"]:
        return check_run(tuple(words[2:]))
    if words[0] == "-m":
        words = [f"{words[1].replace('.', '/')}.py", *words[2:]]
    script = (ROOT / words[0]).read_text()
    for option in words[1:]:
        assert not option.startswith("--") or f'"{option}"' in script, option


@functools.cache
def check_run(words: tuple[str, ...]) -> None:
    """Compose every job of the sweep and build its values; nothing is fetched by that."""
    flags = [word for word in words if word.startswith("-")]
    assert set(flags) <= {"-m", "--help", "--config-dir"}
    overrides = [word for word in words if "=" in word]
    if "--config-dir" in flags:
        overrides.insert(0, f"hydra.searchpath=[file://{ROOT / words[words.index('--config-dir') + 1]}]")
    axes = []
    for one in OverridesParser.create().parse_overrides(overrides):
        swept = one.is_sweep_override()
        assert "-m" in flags or not swept, one.input_line
        values = list(one.sweep_string_iterator()) if swept else [one.get_value_element_as_str()]
        if one.key_or_group == "seed":  # any number composes alike
            assert all(map(str.isdecimal, values)), one.input_line
            values = values[:1]
        axes.append([f"{one.key_or_group}={value}" for value in values])
    for job in itertools.product(*axes):
        config = compose(*job, return_hydra_config=True)
        for group in plan.GROUPS:
            plan.build(config[group])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make, "pip": check_pip, "nashswarm": check_nashswarm, "python": check_python,
}  # fmt: skip


@pytest.mark.parametrize("page", sorted({page for page, command in COMMANDS if "experiments.run" in command}))
def test_page_whose_commands_fetch_something_says_so(page: str) -> None:
    """A model or a text of the hub; a folder can stand in for it."""
    fetched = re.search(r"(?:model|dataset)=(?:gpt2|opt|llama|tinyllama|wikitext2|sst2|deepseek)", GUIDES[page])
    assert not fetched or re.search(r"\bhub\b|NASHSWARM_\w+=", GUIDES[page])


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the documentation make it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES | GUIDES)
def test_links_inside_lead_to_files_and_headings(page: str) -> None:
    text = FENCE.sub("", (PAGES | GUIDES)[page])
    for link in re.findall(r"\]\(((?!https?:|mailto:)[^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if page.startswith("docs/") and path.startswith("generated/"):  # drawn by make docs
            continue
        assert target.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text()), re.M)
            assert anchor in map(slug, headings), f"{page}: {link}"


def test_names_in_the_readme_example_exist() -> None:
    """The block of Python is that of tests/test_api.py in other words: its names exist."""
    (block,) = [block for language, block in FENCE.findall(GUIDES["README.md"]) if language == "python"]
    import nashswarm

    for name in re.findall(r"nashswarm\.(\w+)", block):
        assert hasattr(nashswarm, name)
    fields = {field.name for field in dataclasses.fields(nashswarm.Report)}
    assert set(re.findall(r"report\.(\w+)", block)) <= fields
