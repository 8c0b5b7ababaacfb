"""The page of an experiment: what it shows, that it needs nothing beside it, and that a browser reads it."""

import dataclasses
import pathlib
import re
import shutil
import subprocess

import pytest

from nashswarm import figures, record, typeset
from nashswarm.page import page
from nashswarm.record import Record

RECORDS = pathlib.Path(__file__).parent.parent / "results/records/ablation"
METHODS = ("uniform4", "no_nash", "nash_swarm")
CLICKS = """<script>
const column = name => [...document.querySelectorAll("table.sortable th button")].find(b => b.textContent === name);
column("KL (nats)").click();
const order = [...document.querySelector("table.sortable tbody").rows].map(row => row.cells[0].dataset.value);
document.title = "sorted:" + order.join(",");
document.querySelectorAll("details").forEach(one => one.open = true);
const broken = [...document.images].filter(one => !one.complete || one.naturalWidth === 0);
document.body.dataset.broken = broken.length;
</script>"""


@pytest.fixture(scope="module")
def some() -> list[Record]:
    """A few committed records, one of them as if it came from uncommitted code."""
    found = [one for one in record.read_all(RECORDS) if one.labels["method"] in METHODS]
    assert len(found) == len(METHODS)
    changed = dataclasses.replace(found[0], provenance=found[0].provenance | {"dirty": True})
    return [changed, *(dataclasses.replace(one, provenance=one.provenance | {"dirty": False}) for one in found[1:])]


@pytest.fixture(scope="module")
def content(some: list[Record]) -> str:
    return page(some)


def test_the_page_shows_every_run_and_needs_nothing_beside_it(some: list[Record], content: str) -> None:
    for one in some:
        assert one.fingerprint in content and one.labels["method"] in content
        assert repr(one.metrics["kl"]) in content and typeset.FORMATS["kl"](one.metrics["kl"]) in content
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', content))
    assert "@import" not in content and "url(" not in content
    assert content.count("uncommitted code") == 2  # in the table and among the runs
    assert content.count('<details class="bits">') == len(METHODS)
    assert "Quality against size" in content and page(some) == content


def test_one_page_shows_one_experiment(some: list[Record]) -> None:
    other = dataclasses.replace(some[0], labels=some[0].labels | {"experiment": "<other>"})
    with pytest.raises(ValueError, match="one page shows one experiment, not <other>, ablation"):
        page([*some, other])
    assert "<h1>&lt;other&gt;</h1>" in page([other])


def test_only_what_no_record_shows_is_left_out(some: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    sized = [
        dataclasses.replace(one, metrics={"bytes_file": one.metrics["bytes_file"]}, series={}, layers=[])
        for one in some
    ]
    assert "<figure" not in page(sized) and "<h2>Runs</h2>" in page(sized)

    def broken(*_: object) -> None:
        raise ValueError("shapes do not match")

    monkeypatch.setattr(figures, "pareto", broken)
    with pytest.raises(ValueError, match="shapes do not match"):
        page(some)


@pytest.mark.engines
def test_a_browser_reads_it(some: list[Record], content: str, tmp_path: pathlib.Path) -> None:
    """Headless Chromium sorts the table, draws every picture, and has nothing to complain of."""
    browser = shutil.which("chromium")
    assert browser, "there is no chromium: apt-get install chromium"
    path = tmp_path / "page.html"
    path.write_text(content.replace("</body>", CLICKS + "</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/own",
    ]
    seen = subprocess.run(
        [browser, *options, "--virtual-time-budget=5000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert "CONSOLE" not in seen.stderr, seen.stderr
    by_kl = sorted(some, key=lambda one: one.metrics["kl"])
    assert f"<title>sorted:{','.join(one.labels['method'] for one in by_kl)}</title>" in seen.stdout
    assert 'data-broken="0"' in seen.stdout and seen.stdout.count("<img") == content.count("<img")
    picture = tmp_path / "page.png"
    shot = [f"--screenshot={picture}", "--window-size=1300,2400", path.as_uri()]
    subprocess.run([browser, *options, *shot], capture_output=True, timeout=600, check=True)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
