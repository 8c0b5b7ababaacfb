"""experiments/README.md lists every experiment and every benchmark with its command, what it writes and its minutes."""

import re

from experiments.config import CONF

README = (CONF.parent / "experiments/README.md").read_text()
BENCHMARKS = CONF.parent / "experiments/benchmarks"


def test_readme_lists_every_experiment_with_its_command_and_minutes() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` (\| .* \| \d+ \|)$", README, re.M))
    assert sorted(rows) == sorted(path.stem for path in CONF.glob("experiment/*.yaml"))
    for name, row in rows.items():
        assert f"`python -m experiments.run experiment={name}" in row


def test_readme_lists_every_benchmark_with_what_it_writes_and_minutes() -> None:
    rows = dict(re.findall(r"^\| `python -m experiments\.benchmarks\.(\w+).*?` (\|.* \| \d+ \|)$", README, re.M))
    assert sorted(rows) == sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py"))
    for name, row in rows.items():
        assert f"`{name}.md`" in row or f"`{name}.json`" in row
