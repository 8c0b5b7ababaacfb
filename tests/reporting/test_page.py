"""The page of an experiment: what it shows, that it needs nothing beside it, and that a browser reads it."""

import dataclasses
import html
import pathlib
import re
import shutil
import subprocess

import pytest

from nashswarm.records import record
from nashswarm.records.record import Record
from nashswarm.reporting import page as page_module
from nashswarm.reporting.figures import quality
from nashswarm.reporting.formats import FORMATS
from nashswarm.reporting.page import page

RECORDS = pathlib.Path(__file__).parents[2] / "results/records/ablation"
METHODS = ("uniform4", "fixed_no_nash", "nash_lattice")
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
    runs = [one for one in record.read_all(RECORDS) if one.labels["method"] in METHODS]
    assert len(runs) == len(METHODS)
    changed = dataclasses.replace(runs[0], provenance=runs[0].provenance | {"dirty": True})
    return [changed, *(dataclasses.replace(one, provenance=one.provenance | {"dirty": False}) for one in runs[1:])]


@pytest.fixture(scope="module")
def content(some: list[Record]) -> str:
    return page(some)


def test_page_of_runs_shows_each_without_external_files(some: list[Record], content: str) -> None:
    for one in some:
        assert one.fingerprint in content and one.labels["method"] in content
        assert repr(one.metrics["kl"]) in content and FORMATS["kl"](one.metrics["kl"]) in content
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', content))
    assert "@import" not in content and "url(" not in content
    assert content.count("uncommitted or unknown code") == 2  # in the table and among the runs
    assert content.count('<details class="bits">') == len(METHODS)
    assert "Quality against size" in content and page(some) == content


def test_page_points_tell_the_values_of_their_rows(some: list[Record], content: str) -> None:
    tips = re.findall(
        r'<div class="dot[^"]*" tabindex="0" style="left:([\d.]+)%;top:([\d.]+)%">\n?<span>([^<]*)', content
    )
    assert len(tips) == 2 * len(some), "on disk and in memory"
    for one in some:
        mine = [tip for tip in tips if tip[2].startswith(f"{one.labels['method']}\n")]
        assert len(mine) == 2 and all(0 < float(place) < 100 for tip in mine for place in tip[:2])
        assert all(f"KL (nats): {FORMATS['kl'](one.metrics['kl'])}" in tip[2] for tip in mine)
    lefts = {tip[2].split("\n")[0]: float(tip[0]) for tip in tips[: len(some)]}
    smallest = min(some, key=lambda one: one.metrics["bytes_file"])
    assert min(lefts, key=lambda name: lefts[name]) == smallest.labels["method"]


def test_page_shows_main_columns_first_and_maps_every_layer(some: list[Record], content: str) -> None:
    heads = re.findall(r'<th scope="col"><button>([^<]*)</button>', content)
    first = heads[: heads.index("")]
    assert first[0] == "method" and {"KL (nats)", "MB", "MB in memory"} <= set(first) and "quantize s" not in first
    assert f'class="sortable keep{len(first) + 1}"' in content and "quantize s" in heads
    for layer in some[0].layers:
        assert html.escape(f"{layer['name']}: {layer['parameters']:,} weights in {layer['bytes']:,} bytes") in content
    assert "<code>python -m experiments.run experiment=ablation</code>" in content


OWN = {
    "layers": ("weights", "predicted damage (nats)", "KL alone (nats)"),
    "load": ("clients", "due per second", "P95, full", "full P95 ÷ P95"),
    "moe": ("NLL (nats)", "MaxVio", "Gini", "router µs/token"),
    "performance_analysis": ("experts", "top-k µs/token", "leaders", "layer ÷ dense, one token"),
    "quick_validation": ("MB as floats", "loss (nats)", "loss compressed", "compressed ms"),
    "speed": ("MB in memory", "decode ms", "× prefill"),
}  # others: what compression costs
CHARTS = {
    "layers": ("Predicted and measured damage of single matrices",),
    "load": ("What clients of a server wait, uniform3",),
    "moe": ("How evenly experts work",),
    "speed": ("Speed", "Memory"),
}


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("experiment", sorted({path.name for path in RECORDS.parent.iterdir()} - {"audit"}))
def test_page_of_committed_experiment_has_its_columns(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "bits", lambda one: [])  # slow, and the same for all
    content_of_page = page(list(record.read_all(RECORDS.parent / experiment)))
    heads = re.findall(r'<th scope="col"><button>([^<]+)</button>', content_of_page)
    for heading in OWN.get(experiment, ("MB", "saved %")):
        assert html.escape(heading) in heads
    for caption in CHARTS.get(experiment, ()):
        assert f"<figcaption>{caption}</figcaption>" in content_of_page
    for table in content_of_page.split("<h2>Runs</h2>")[0].split("<table")[1:]:
        for row in re.findall(r"<tr[^>]*>(<td.*)</tr>", table):
            numbers = re.findall(r'<td data-value="([^"]*)">[^<]', row)
            assert any(numbers), "a row without a number"


def test_page_runs_of_older_code_show_their_commit(some: list[Record]) -> None:
    """Of three runs the last one began with other code than the others."""
    commits = {"uniform4": "a" * 40, "fixed_no_nash": "b" * 40, "nash_lattice": "b" * 40}
    started = {"uniform4": "2026-01-01", "fixed_no_nash": "2026-01-02", "nash_lattice": "2026-01-03"}
    runs = []
    for one in some:
        origin = {"commit": commits[one.labels["method"]], "dirty": False, "started": started[one.labels["method"]]}
        runs.append(dataclasses.replace(one, provenance=one.provenance | origin, layers=[]))
    for shown in (page(runs), page(runs[::-1])):
        flagged = re.findall(r'<tr[^>]*><td class="word" data-value="(\w+)".*older code: (\w+)', shown)
        assert flagged == [("uniform4", "aaaaaaa")] * 2, "in the table and among the runs"
        assert "Runs of commits aaaaaaa (1) and bbbbbbb (2)." in shown


def test_page_of_two_experiments_raises(some: list[Record]) -> None:
    other = dataclasses.replace(some[0], labels=some[0].labels | {"experiment": "<other>"})
    with pytest.raises(ValueError, match="one page shows one experiment, not <other>, ablation"):
        page([*some, other])
    assert "<h1>&lt;other&gt;</h1>" in page([other])


def test_page_without_series_leaves_out_figures_only(some: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    sized = [
        dataclasses.replace(one, metrics={"bytes_file": one.metrics["bytes_file"]}, series={}, layers=[])
        for one in some
    ]
    assert "<figure" not in page(sized) and "<h2>Runs</h2>" in page(sized)

    def broken(*_: object) -> None:
        raise ValueError("shapes do not match")

    monkeypatch.setattr(quality, "pareto", broken)
    with pytest.raises(ValueError, match="shapes do not match"):
        page(some)


@pytest.mark.engines
def test_page_in_a_browser_sorts_and_draws(some: list[Record], content: str, tmp_path: pathlib.Path) -> None:
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
