"""What README.md and docs/results.md say is what the records and the repository say."""

import functools
import itertools
import pathlib
import re

import pandas as pd
import pytest

from nashswarm.records import record
from nashswarm.records.record import Record
from nashswarm.reporting import frame, tables, typeset

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMITTED = ROOT / "results" / "records"
TABLES = ROOT / "results" / "tables"
CHOICES = {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")}
RECORDED = sorted({path.name for path in COMMITTED.iterdir()} & CHOICES)  # not the reader's own runs, in single/
EXPERIMENTS = [name for name in RECORDED if name != "audit"]
# Their sign-flip tests take most of a minute; tests/reporting/test_derive.py derives them as well.
LONG = {"glue", "main", "presets", "scaling"}


@functools.cache
def records_of(experiment: str) -> list[Record]:
    return list(record.read_all(COMMITTED / experiment))


@functools.cache
def equal_bytes() -> pd.DataFrame:
    return tables.equal_bytes(itertools.chain.from_iterable(map(records_of, RECORDED)))


@functools.cache
def committed(name: str) -> pd.DataFrame:
    """A committed table, by method."""
    return pd.read_csv(TABLES / f"{name}.csv").set_index("method")


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("| ").split(" | ")]


def rows_of(markdown: str) -> list[list[str]]:
    """The cells of a table, its headings first."""
    return [cells(line) for line in markdown.splitlines() if line.startswith("|") and ":--" not in line]


# the tables


def test_readme_table_has_rows_of_the_derived_table_of_the_real_model() -> None:
    ((path, shown),) = re.findall(r"<!-- rows of (results/[\w./]+\.md) -->\n(.*?)<!-- end -->", README, re.S)
    heading, *rows = rows_of(shown)
    derived_heading, *derived = rows_of((ROOT / path).read_text())
    places = [derived_heading.index(column) for column in heading]
    method = derived_heading.index("method")
    derived_rows = {row[method]: [row[place] for place in places] for row in derived}
    assert path == "results/tables/real.md" and len(rows) >= 3
    for row in rows:
        assert row == derived_rows[row[0]]


def test_docs_include_the_derived_tables() -> None:
    """The pages hold no copy of a table: they include the files that ``make derive`` writes."""
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("results.md", "audit.md"))
    included = set(re.findall(r"\{include\} \.\./(results/[\w./]+\.md)", pages))
    expected = {"ablation", "audit", "equal_bytes", "main", "moe", "recovery", "speed_contestants"}
    assert {f"results/tables/{name}.md" for name in expected} <= included
    assert {f"results/benchmarks/{name}.md" for name in ("equal_bytes_wikitext2", "encoder_3", "encoder_2")} <= included
    for path in included:
        assert rows_of((ROOT / path).read_text()), path


FORMATS = [(".md", typeset.markdown), (".csv", typeset.csv), (".tex", typeset.latex)]


@pytest.mark.parametrize(
    "experiment", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in EXPERIMENTS]
)
def test_committed_tables_follow_from_the_records(experiment: str) -> None:
    records = records_of(experiment)
    table = tables.special_table(records) or [frame.tested(frame.average(frame.frame(records)), records)]
    layers = tables.layers(records)
    for suffix, render in FORMATS:
        assert render(*table) == (TABLES / f"{experiment}{suffix}").read_text()
        if len(layers):
            assert render(layers, tables.LAYERS) == (TABLES / f"{experiment}_layers{suffix}").read_text()


def test_committed_table_of_equal_bytes_follows_from_all_records() -> None:
    for suffix, render in FORMATS:
        assert render(equal_bytes(), tables.EQUAL_BYTES) == (TABLES / f"equal_bytes{suffix}").read_text()


# the sentences of docs/results.md


def test_nash_lattice_in_main_has_less_than_a_tenth_of_every_rivals_divergence() -> None:
    table = equal_bytes()
    rivals = table[(table["experiment"] == "main") & ~table["method"].str.startswith("lattice_no_swarm")]
    compared = rivals.dropna(subset="kl_ratio")
    assert len(compared) >= 30 and compared["method"].str.startswith("peer_").sum() >= 12
    assert compared["kl_ratio_high"].max() < 0.1
    kl = committed("main")["kl"]
    assert all(kl[f"peer_auto_round[bits={bits}]"] >= kl[f"rtn[bits={bits}]"] for bits in (3, 4))


def test_presets_and_allocations_on_tiles_rank_as_told() -> None:
    presets, tiles = committed("presets"), committed("allocations")
    prototype = presets.loc[["low_resource", "balanced", "high_accuracy"]]
    assert presets.loc["nash_lattice", "bits_per_weight_model"] <= 3.0 < prototype["bits_per_weight_model"].max()
    assert presets.loc["nash_lattice", "kl"] < prototype["kl"].min()
    game = tiles.loc["fixed_width"]
    assert tiles.loc["evopress", "kl_high"] < game["kl_low"] and tiles.loc["radio", "kl"] < game["kl"]
    assert tiles.loc["evopress", "quantize_seconds"] > 3 * game["quantize_seconds"]
    assert tiles["bytes_file"].max() / tiles["bytes_file"].min() < 1.0001
    kl = committed("main")["kl"]
    ahead = {bits: kl[f"radio[bits={bits}]"] < kl[f"fixed_width[bits={bits}]"] for bits in ("2", "2.3", "3", "4", "5")}
    assert ahead == {"2": True, "2.3": True, "3": True, "4": False, "5": False}
    assert all(kl[f"baq[bits={bits}]"] > kl[f"fixed_width[bits={bits}]"] for bits in ahead)


def test_budgeted_game_beats_its_ablations() -> None:
    rows = frame.frame(records_of("ablation")).set_index("method")
    game = rows.loc["nash_lattice"]
    for control in ("fixed_no_nash", "lattice_no_bit_game", "lattice_no_code_game", "no_quantization"):
        assert game["kl_high"] < rows.loc[control, "kl_low"], control
        assert abs(game["bytes_file"] / rows.loc[control, "bytes_file"] - 1) < 2e-3, control
    assert rows.loc["lattice_no_cache", "kl"] == game["kl"]
    assert rows.loc["lattice_no_cache", "quantize_seconds"] > game["quantize_seconds"]


def test_routers_of_mixtures_rank_as_told() -> None:
    metrics = {
        (one.labels["model"], one.labels["method"], one.labels["seed"]): one.metrics for one in records_of("moe")
    }
    seeds = {seed for _, _, seed in metrics}
    better = {
        model: sum(
            metrics[model, "moe_nash_swarm", seed]["nll"] < metrics[model, "moe_top_k", seed]["nll"] for seed in seeds
        )
        for model in ("moe_small", "moe_small64")
    }
    assert (len(seeds), better) == (3, {"moe_small": 2, "moe_small64": 3})
    games = [one for (_, method, _), one in metrics.items() if method == "moe_nash_swarm"]
    gains = [one["served_tokens_per_second"] / one["served_tokens_per_second_without"] for one in games]
    assert min(gains) < 1 < max(gains)
    for model, seed in itertools.product(better, seeds):
        game, switch = (metrics[model, method, seed] for method in ("moe_nash_swarm", "moe_top_k"))
        assert game["max_violation"] < switch["max_violation"] and game["dead_experts"] == 0
        assert game["max_violation_following"] < 0.04 < game["max_violation"]
        assert game["resident_hits"] > game["resident_hits_without"]
        if model == "moe_small64":
            assert game["nll_following"] > switch["nll"]
        else:
            losses = [one["nll"] for (size, _, number), one in metrics.items() if (size, number) == (model, seed)]
            assert min(losses) == metrics[model, "moe_dense", seed]["nll"]


# README.md


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_readme_names_make_targets_and_files_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M) or target in ("it", "sure"), target
    for path in re.findall(r"`((?:nashswarm|scripts|results|experiments)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_readme_map_names_folders_that_exist() -> None:
    (tree,) = re.findall(r"## Map of the repository\n\n```text\n(.*?)```", README, re.S)
    for line in tree.splitlines():
        for folder in re.match(r"(?:[\w.]+/ ?)+", line).group().split():  # type: ignore[union-attr]
            assert (ROOT / folder).is_dir(), folder


def test_readme_names_choices_that_exist() -> None:
    """Every model, dataset, method, measure and experiment named after its group is a file of conf/."""
    for group in ("model", "dataset", "method", "measure", "experiment"):
        for choices in re.findall(rf"\b{group}=([\w,]+)", README):
            for choice in choices.split(","):
                assert (ROOT / "conf" / group / f"{choice}.yaml").exists(), f"{group}={choice}"


def test_readme_example_prints_the_size_and_saving_of_the_record() -> None:
    """The printed line of the example, as far as the record of the same method and budget has it.

    The record calibrates with other windows, so that bytes differ a little; the budget is the same.
    """
    (printed,) = re.findall(r"```text\n([\d,]+) bytes, ([\d.]+)% saved", README)
    row = committed("ablation").loc["nash_lattice"]
    assert abs(int(printed[0].replace(",", "")) / row["bytes_file"] - 1) < 2e-3
    assert float(printed[1]) == pytest.approx(100 * row["compression"], abs=0.1)
