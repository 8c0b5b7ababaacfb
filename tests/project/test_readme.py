"""What the README says is what the repository does."""

import itertools
import pathlib
import re

import pandas as pd
import pytest

from nashswarm.records import record
from nashswarm.reporting import frame, tables, typeset

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMITTED = ROOT / "results" / "records"


def test_its_tables_are_the_derived_ones() -> None:
    shown = re.findall(r"<!-- (results/[\w./]+\.md) -->\n(.*?)<!-- end -->", README, re.S)
    assert {"results/tables/ablation.md", "results/tables/audit.md"} <= {path for path, _ in shown}
    for path, table in shown:
        assert table.strip() == (ROOT / path).read_text().strip(), path


FORMATS = [(".md", typeset.markdown), (".csv", typeset.csv), (".tex", typeset.latex)]


@pytest.mark.parametrize("experiment", sorted({path.name for path in COMMITTED.iterdir()} - {"audit"}))
def test_committed_tables_follow_from_the_records(experiment: str) -> None:
    records = list(record.read_all(COMMITTED / experiment))
    found = tables.unlike(records) or [frame.tested(frame.average(frame.frame(records)), records)]
    layers = tables.layers(records)
    for suffix, render in FORMATS:
        assert render(*found) == (ROOT / f"results/tables/{experiment}{suffix}").read_text()
        if len(layers):
            path = ROOT / f"results/tables/{experiment}_layers{suffix}"
            assert render(layers, tables.LAYERS) == path.read_text()


def test_the_committed_table_of_equal_bytes_follows_from_all_records() -> None:
    table = tables.equal_bytes(record.read_all(COMMITTED))
    for suffix, render in FORMATS:
        assert render(table, tables.EQUAL_BYTES) == (ROOT / f"results/tables/equal_bytes{suffix}").read_text()


def test_in_the_main_comparison_nash_swarm_has_less_than_a_tenth_of_every_rivals_divergence() -> None:
    table = tables.equal_bytes(record.read_all(COMMITTED))
    rivals = table[(table["experiment"] == "main") & ~table["method"].str.startswith("no_swarm")]
    compared = rivals.dropna(subset="kl_ratio")
    assert len(compared) >= 30 and compared["method"].str.startswith("peer_").sum() >= 12
    assert compared["kl_ratio_high"].max() < 0.1
    kl = pd.read_csv(ROOT / "results/tables/main.csv").set_index("method")["kl"]
    assert all(kl[f"peer_auto_round[bits={bits}]"] >= kl[f"rtn[bits={bits}]"] for bits in (3, 4))


def test_what_it_says_of_presets_and_of_allocations_on_tiles() -> None:
    presets, tiles = (
        pd.read_csv(ROOT / f"results/tables/{name}.csv").set_index("method") for name in ("presets", "allocations")
    )
    prototype = presets.loc[["low_resource", "balanced", "high_accuracy"]]
    assert presets.loc["nash_swarm", "bits_per_weight_model"] <= 3.0 < prototype["bits_per_weight_model"].max()
    assert presets.loc["nash_swarm", "kl"] < prototype["kl"].min()
    own = tiles.loc["fixed_width"]
    assert tiles.loc["evopress", "kl_high"] < own["kl_low"] and tiles.loc["radio", "kl"] < own["kl"]
    assert tiles.loc["evopress", "quantize_seconds"] > 3 * own["quantize_seconds"]
    assert tiles["bytes_file"].max() / tiles["bytes_file"].min() < 1.0001
    kl = pd.read_csv(ROOT / "results/tables/main.csv").set_index("method")["kl"]
    ahead = {bits: kl[f"radio[bits={bits}]"] < kl[f"fixed_width[bits={bits}]"] for bits in ("2", "2.3", "3", "4", "5")}
    assert ahead == {"2": True, "2.3": True, "3": True, "4": False, "5": False}
    assert all(kl[f"baq[bits={bits}]"] > kl[f"fixed_width[bits={bits}]"] for bits in ahead)


def test_the_budgeted_game_beats_its_ablations_in_the_committed_table() -> None:
    """The sentences of the README that say who wins."""
    rows = frame.frame(record.read_all(COMMITTED / "ablation")).set_index("method")
    game = rows.loc["nash_swarm"]
    for control in ("no_nash", "no_bit_game", "no_code_game", "no_quantization"):
        assert game["kl_high"] < rows.loc[control, "kl_low"], control
        assert abs(game["bytes_file"] / rows.loc[control, "bytes_file"] - 1) < 2e-3, control
    assert rows.loc["no_cache", "kl"] == game["kl"]
    assert rows.loc["no_cache", "quantize_seconds"] > game["quantize_seconds"]


def test_make_targets_and_files_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M) or target in ("it", "sure"), target
    for path in re.findall(r"`((?:nashswarm|scripts|results|experiments)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_choices_it_names_exist() -> None:
    """Every model, dataset, method, measure and experiment named after its group is a file of conf/."""
    for group in ("model", "dataset", "method", "measure", "experiment"):
        for choices in re.findall(rf"\b{group}=([\w,]+)", README):
            for choice in choices.split(","):
                assert (ROOT / "conf" / group / f"{choice}.yaml").exists(), f"{group}={choice}"


def test_the_sentences_about_mixtures_of_experts() -> None:
    metrics = {
        (one.labels["model"], one.labels["method"], one.labels["seed"]): one.metrics
        for one in record.read_all(COMMITTED / "moe")
    }
    seeds = {seed for _, _, seed in metrics}
    better = {
        model: sum(
            metrics[model, "moe_nash_swarm", seed]["nll"] < metrics[model, "moe_top_k", seed]["nll"] for seed in seeds
        )
        for model in ("moe_small", "moe_small64")
    }
    assert (len(seeds), better) == (3, {"moe_small": 2, "moe_small64": 3})
    own = [one for (_, method, _), one in metrics.items() if method == "moe_nash_swarm"]
    gains = [one["served_tokens_per_second"] / one["served_tokens_per_second_without"] for one in own]
    assert min(gains) < 1 < max(gains)
    for model, seed in itertools.product(better, seeds):
        own, switch = (metrics[model, method, seed] for method in ("moe_nash_swarm", "moe_top_k"))
        assert own["max_violation"] < switch["max_violation"] and own["dead_experts"] == 0
        assert own["max_violation_following"] < 0.04 < own["max_violation"]
        assert own["resident_hits"] > own["resident_hits_without"]
        if model == "moe_small64":
            assert own["nll_following"] > switch["nll"]
        else:
            every = [one["nll"] for (size, _, number), one in metrics.items() if (size, number) == (model, seed)]
            assert min(every) == metrics[model, "moe_dense", seed]["nll"]
