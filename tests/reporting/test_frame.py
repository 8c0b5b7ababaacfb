"""Tables and figures of synthetic records whose right answers can be seen by eye."""

import collections
import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from nashswarm.records import record
from nashswarm.records.record import Record
from nashswarm.reporting import frame, labels, latex, tables, typeset
from nashswarm.reporting.figures import games, quality
from nashswarm.reporting.formats import MISSING, UNCLEAN
from nashswarm.reporting.labels import ABLATIONS

ROOT = pathlib.Path(__file__).parents[2]
KL = {
    "baseline": 0.0, "uniform4": 0.031, "uniform3": 0.17, "as_published": 1.9, "nash_lattice": 0.0141, "gptq": 0.09,
    "fixed_no_nash": 0.093, "no_quantization": 0.41, "lattice_no_swarm": 0.0143, "lattice_no_cache": 0.0141,
    "lattice_no_bit_game": 0.062, "lattice_no_code_game": 0.0207,
}  # fmt: skip
MEGABYTES = dict.fromkeys(KL, 2.67) | {
    "baseline": 28.4,
    "uniform4": 4.1,
    "uniform3": 3.3,
    "gptq": 2.9,
    "as_published": 25.2,
}
ABLATION = list(KL)
FULL_NLL = 3.9
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def synthetic(method: str, seed: int = 0, kl: float | None = None, **config: Any) -> Record:
    """A record as the runner writes them, with 24 windows of 255 tokens."""
    rng = np.random.default_rng([seed, *method.encode()])
    level = KL.get(method, 0.1) if kl is None else kl
    windows = level * np.exp(0.2 * rng.standard_normal(24) - 0.02)
    mean, spread = float(windows.mean()), float(windows.std() / 5)
    metrics = {
        "nll": FULL_NLL + mean, "nll_delta": mean, "nll_delta_low": mean - spread, "nll_delta_high": mean + spread,
        "kl": mean, "kl_low": mean - spread, "kl_high": mean + spread, "top1_agreement": math.exp(-2 * mean**0.5),
        "tokens": 24 * 255.0, "bits_per_weight_model": 8 * MEGABYTES.get(method, 3.0) / 7.1,
        "bytes_file": MEGABYTES.get(method, 3.0) * 1e6, "compression": 1 - MEGABYTES.get(method, 3.0) / 28.4,
        "quantize_seconds": 12.5 + seed,
    }  # fmt: skip
    series = {"nll": (FULL_NLL + windows).tolist(), "kl": windows.tolist(), "tokens": [255.0] * 24}
    allocation = "transformer.wte 16\n"
    if method == "nash_lattice" or method.startswith(ABLATIONS):
        regret = [3e-3 * 0.2**sweep for sweep in range(7)] + [0.0]
        series |= {"regret": regret, "potential": [mean + 0.02 * 0.4**sweep for sweep in range(8)]}
        metrics |= {"regret_max": 2.1e-6, "regret_mean": 3e-9, "flock_moves": 1234.0, "sweeps": 7.0, "price": 4.2e-8,
                    "potential_start": series["potential"][0], "potential_end": series["potential"][-1]}  # fmt: skip
        allocation += f"transformer.h.0.mlp.c_fc 24x8 {' '.join(f'{b}*{n}' for b, n in TILES)}\nlm_head mixed\n"
    labels = {"experiment": "ablation", "method": method, "model": "gpt2_small", "dataset": "wikitext2"}
    return Record(
        labels={**labels, "measure": "quality", "seed": str(seed)},
        config={
            "seed": seed,
            "method": {"name": method, **config},
            "model": {"sha256": "ab"},
            "dataset": {"text": "cd"},
        },
        metrics=metrics,
        series=series,
        layers=[],
        allocation=allocation,
        provenance={"commit": COMMIT, "dirty": False},
    )


TILES = [(3, 60), (4, 30), (2, 42), (8, 6), (0, 10), (3, 44)]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [synthetic(method, seed) for method in ABLATION for seed in (0, 1)]


@pytest.fixture(scope="module")
def folder(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two seeds of five methods: enough for every figure of an ablation, and drawn twice in few seconds."""
    folder = tmp_path_factory.mktemp("records")
    for one in records:
        if one.labels["method"] in ("baseline", "uniform4", "nash_lattice", "fixed_no_nash", "gptq"):
            record.write(folder, one)
    return folder


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rendered(content: Any) -> str:
    console = Console(width=240)
    with console.capture() as capture:
        console.print(content)
    return capture.get()


def test_frame_of_records_has_one_row_each_with_perplexity(records: list[Record]) -> None:
    table = frame.frame([*records, records[0]])
    assert len(table) == len(records)
    assert table["perplexity"].tolist() == pytest.approx(np.exp(table["nll"]).tolist())
    row = table[table["method"] == "uniform3"].iloc[0]
    assert row["perplexity_low"] < row["perplexity"] < row["perplexity_high"]
    assert row["fingerprint"] == next(r for r in records if r.labels["method"] == "uniform3").fingerprint


def test_frame_run_of_two_experiments_has_a_row_in_each(records: list[Record]) -> None:
    again = dataclasses.replace(records[0], labels=records[0].labels | {"experiment": "elsewhere"})
    both = frame.frame([records[0], again, again])
    assert sorted(both["experiment"]) == sorted(["elsewhere", records[0].labels["experiment"]])


def test_frame_without_records_raises_with_remedy() -> None:
    with pytest.raises(ValueError, match="run an experiment first"):
        frame.frame([])


def test_average_of_two_seeds_is_their_mean_and_count(records: list[Record]) -> None:
    means = frame.average(frame.frame(records)).set_index("method")
    pair = [r.metrics for r in records if r.labels["method"] == "fixed_no_nash"]
    assert means.loc["fixed_no_nash", "kl"] == pytest.approx((pair[0]["kl"] + pair[1]["kl"]) / 2)
    assert means.loc["fixed_no_nash", "perplexity"] == pytest.approx(math.exp((pair[0]["nll"] + pair[1]["nll"]) / 2))
    assert (means["seeds"] == 2).all()


def test_average_metric_absent_in_one_seed_is_missing() -> None:
    whole, part = synthetic("fixed_no_nash", 0), synthetic("fixed_no_nash", 1)
    del part.metrics["kl"]
    assert frame.average(frame.frame([whole, part]))["kl"].isna().all()


def test_average_of_two_configurations_raises_naming_the_field() -> None:
    runs = frame.frame([synthetic("fixed_no_nash", 0, bits=3), synthetic("fixed_no_nash", 1, bits=4)])
    with pytest.raises(ValueError, match=r"fixed_no_nash differ in more than the seed \(method\.bits: 3, 4\)"):
        frame.average(runs)
    assert len(frame.points(runs)) == 2


def test_average_of_two_thread_counts_keeps_separate_rows() -> None:
    def on(threads: int, method: str) -> Record:
        plain = synthetic(method)
        return dataclasses.replace(plain, config=plain.config | {"threads": threads})

    means = frame.average(frame.frame([on(1, "gptq"), on(2, "gptq"), on(2, "uniform4")]))
    shown = typeset.cells(means)[["method", "threads"]].to_numpy().tolist()
    assert shown == [["uniform4", "2"], ["gptq", "1"], ["gptq", "2"]]
    assert "threads" not in typeset.cells(frame.average(frame.frame([on(2, "gptq")])))


def test_select_without_match_raises_naming_the_choices(records: list[Record]) -> None:
    table = frame.frame(records)
    assert set(frame.select(table, method="fixed_no_nash", seed="1")["seed"]) == {"1"}
    with pytest.raises(ValueError, match="no record has experiment=main; there are records of ablation"):
        frame.select(table, experiment="main")
    with pytest.raises(ValueError, match="'bits' is not a label"):
        frame.select(table, bits="3")


def test_rank_of_reversed_methods_restores_their_order() -> None:
    wanted = ["baseline", "uniform8", "uniform3", "rtn", "gptq", "as_published", "fixed_no_nash", "hqq", "nash_lattice"]
    assert sorted(reversed(wanted), key=labels.rank) == wanted


def test_cells_of_ablation_show_intervals_and_no_empty_column(records: list[Record]) -> None:
    content = typeset.cells(frame.average(frame.frame(records))).set_index("method")
    assert re.fullmatch(r"0\.\d{4} \[0\.\d{4}, 0\.\d{4}\]", content.loc["nash_lattice", "KL (nats)"])
    assert content.loc["nash_lattice", "max regret"] == "2.1e-06"
    assert content.loc["baseline", "ΔNLL (nats)"] == "+0.0000"
    assert content.loc["baseline", "max regret"] == MISSING
    assert content.loc["nash_lattice", "MB"] == "2.67"
    assert "decode ms" not in content and "model" not in content and "seeds" in content


def test_cells_varying_label_becomes_a_column(records: list[Record]) -> None:
    other = synthetic("baseline", 0, kl=0.0, other=True)
    other.labels["model"] = "gpt2_large"
    table = frame.average(frame.frame([*records, other]))
    assert list(typeset.cells(table)["model"])[:2] == ["gpt2_large", "gpt2_small"]


def test_latex_special_characters_are_escaped(records: list[Record]) -> None:
    text = typeset.latex(frame.average(frame.frame(records)))
    assert r"\toprule" in text and r"\bottomrule" in text
    assert r"fixed\_no\_nash" in text and "no_nash" not in text
    assert r"{@{}r@{}}saved\\\%\end{tabular}" in text and r"$\Delta$NLL" in text and r"$2.1{\cdot}10^{-6}$" in text
    assert latex.tex("50% of a_b & {c}") == r"50\% of a\_b \& \{c\}"


def test_cells_kl_before_stands_left_of_kl() -> None:
    one = synthetic("gptq")
    one.metrics.update({"kl_before": 0.4, "kl_before_low": 0.3, "kl_before_high": 0.5, "bytes_file_before": 2e6})
    shown = typeset.cells(frame.average(frame.frame([one])))
    assert shown["KL before (nats)"].tolist() == ["0.4000 [0.3000, 0.5000]"] and shown["MB before"].tolist() == ["2.00"]
    assert list(shown).index("KL before (nats)") == list(shown).index("KL (nats)") - 1


def test_markdown_and_csv_of_ablation_have_one_row_per_method(records: list[Record]) -> None:
    means = frame.average(frame.frame(records))
    lines = typeset.markdown(means).splitlines()
    assert len(lines) == 2 + len(ABLATION) + 2 and len({line.count("|") for line in lines[:-2]}) == 1
    assert lines[2].startswith("| baseline |") and lines[-3].startswith("| nash_lattice |")
    assert lines[-2:] == ["", f"Runs of commit {COMMIT[:7]}."]
    assert f",{means['kl'].iloc[3]:.12g}," in typeset.csv(means)
    assert typeset.csv(means).count(COMMIT) == len(means), "of two seeds one commit"


@pytest.mark.parametrize("width", [60, 100, 150, 400])
def test_terminal_of_any_width_breaks_no_cell(width: int, records: list[Record]) -> None:
    """Fewer columns instead, and the table says how many; the method and KL always stay."""
    means = frame.average(frame.frame(records))
    whole = typeset.cells(means)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(typeset.terminal(means, width=width))
    lines = [line for line in capture.get().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    shown = typeset.fitting(whole, typeset.COLUMNS, width)
    assert cells == shown.to_numpy().tolist() and {"method", "KL (nats)"} <= set(shown)
    assert all(len(line) <= width for line in lines)
    missing = whole.shape[1] - shown.shape[1]
    assert (f"{missing} more column" in capture.get()) == (missing > 0) and (missing == 0) == (width == 400)


UNCLEAN_ORIGINS: list[dict[str, Any]] = [{"commit": "ab", "dirty": True}, {"commit": None, "dirty": None}, {}]


@pytest.mark.parametrize("provenance", UNCLEAN_ORIGINS)
def test_tables_of_uncommitted_code_are_marked_and_refused(provenance: dict[str, Any], records: list[Record]) -> None:
    frame.refuse_dirty(frame.frame(records))
    assert UNCLEAN not in typeset.markdown(frame.average(frame.frame(records)))
    unclean = [dataclasses.replace(synthetic("hqq", seed), provenance=origin) for seed, origin in
               enumerate(({"commit": "cd", "dirty": False}, provenance))]  # fmt: skip
    table = frame.frame([*records, *unclean])
    with pytest.raises(ValueError, match="runs of hqq come from uncommitted or unknown code"):
        frame.refuse_dirty(table)
    means = frame.average(table)
    for text in (typeset.markdown(means), rendered(typeset.terminal(means))):
        assert "hqq‡" in text and "‡ of code that was not committed, or is unknown." in text
        assert text.count("‡") == 2, "one row and the note"
    by_line = dict(zip(means["method"], typeset.csv(means).splitlines()[1:], strict=True))
    assert "True" in by_line["hqq"] and "False" in by_line["nash_lattice"]
    assert r"hqq$^\ddagger$" in typeset.latex(means)


def test_note_runs_of_several_commits_are_counted() -> None:
    def of(method: str, seed: int, commit: str | None) -> Record:
        return dataclasses.replace(synthetic(method, seed), provenance={"commit": commit, "dirty": False})

    runs = [of("gptq", 0, "bbbbbbbbbb"), of("gptq", 1, "aaaaaaaaaa"), of("hqq", 0, "aaaaaaaaaa")]
    means = frame.average(frame.frame(runs))
    assert typeset.note(means) == "Runs of commits aaaaaaa (2) and bbbbbbb (1)."
    assert "bbbbbbbbbb aaaaaaaaaa" in typeset.csv(means)
    three = frame.points(frame.frame([*runs, of("rtn", 0, None)]))
    assert typeset.note(three) == "Runs of commits aaaaaaa (2), bbbbbbb (1) and unknown (1)."
    twice = pd.concat([means.iloc[[0]], means.iloc[[0]]], ignore_index=True)
    assert typeset.note(twice) == "Runs of commits aaaaaaa (1) and bbbbbbb (1).", "a run of two rows counts once"


def test_tables_name_the_models_that_were_dequantized() -> None:
    origin = {"commit": "aaaaaaaaaa", "dirty": False}
    floats = [dataclasses.replace(synthetic("gptq", seed), provenance=origin) for seed in (0, 1)]
    types = {"dequantized_from": ["Q4_1", "Q8_0"]}
    gguf = [
        dataclasses.replace(one, labels=one.labels | {"model": "smollm2_135m"}, config=one.config | {"model": "other"})
        for one in floats
    ]
    gguf = [dataclasses.replace(one, provenance=origin | types) for one in gguf]
    sentence = "The weights of smollm2_135m were dequantized from Q4_1 and Q8_0."
    means = frame.average(frame.frame([*floats, *gguf]))
    assert means["dequantized_from"].tolist() == ["", "Q4_1 and Q8_0"]
    assert typeset.note(means) == f"{sentence}\nRuns of commit aaaaaaa."
    assert sentence in typeset.markdown(means) and "Q4_1 and Q8_0" in typeset.csv(means).splitlines()[2]
    assert "dequantized_from" not in typeset.csv(frame.average(frame.frame(floats)))


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("experiment", sorted(path.name for path in (ROOT / "results/records").iterdir()))
def test_note_of_committed_experiment_counts_all_its_runs(experiment: str) -> None:
    runs = list(record.read_all(ROOT / "results/records" / experiment))
    runs = [one for one in runs if one.labels["measure"] != "published"]
    shown_tables = [tables.special_table(runs) or (frame.points(frame.frame(runs)), typeset.COLUMNS)]
    shown_tables += [(table, columns) for table, columns in
              ((tables.speed(runs), tables.SPEED), (tables.layers(runs), tables.LAYERS)) if len(table)]  # fmt: skip
    counts = collections.Counter(one.provenance["commit"][:7] for one in runs)
    for table, columns in shown_tables:
        last = typeset.markdown(table, columns).splitlines()[-1]
        noted_counts = re.findall(r"([0-9a-f]{7})(?: \((\d+)\))?", last)
        assert dict(noted_counts) == {commit: str(count) if len(counts) > 1 else "" for commit, count in counts.items()}


def outcome(status: str, method: str, path: pathlib.Path | None = None, message: str = "") -> dict[str, Any]:
    return {"status": status, "labels": {"method": method}, "record": str(path) if path else None, "message": message,
            "log": f"logs/{method}.log", "overrides": [f"method={method}"]}  # fmt: skip


def test_summary_of_jobs_counts_them_and_explains_failures(records: list[Record]) -> None:
    outcomes = [outcome("finished", "fixed_no_nash"), outcome("skipped", "uniform4"),
                outcome("failed", "hqq", message="ValueError: 3 is odd\ntraceback")]  # fmt: skip
    text = rendered(frame.summary(outcomes, records[:2]))
    assert "3 jobs: 1 finished, 1 skipped, 1 failed" in text and "baseline" in text
    assert "method=hqq" in text and "ValueError: 3 is odd" in text and "traceback" not in text
    assert "logs/hqq.log" in text
    assert "0 finished" in rendered(frame.summary(outcomes[2:], []))


def test_tiles_of_allocation_are_a_grid_of_bits() -> None:
    grids = games.tiles(synthetic("nash_lattice").allocation)
    assert list(grids) == ["transformer.h.0.mlp.c_fc"]
    grid = grids["transformer.h.0.mlp.c_fc"]
    assert grid.shape == (24, 8) and (grid == 8).sum() == 6 and grid[0, 0] == 3 and grid[-1, -1] == 3
    for broken in ("mlp 2x3 4*5", "mlp 2x3 4", "mlp 2by3 4*6"):
        with pytest.raises(ValueError, match="allocation of 'mlp' is not"):
            games.tiles(broken)
    with pytest.raises(ValueError, match="no layer is made of tiles"):
        games.bit_map("mlp 16\n")
    with pytest.raises(ValueError, match="'attn' is not a layer made of tiles"):
        games.bit_map("mlp 1x1 4*1\n", "attn")


def test_frontier_of_points_keeps_the_undominated() -> None:
    sizes, values = np.array([1.0, 2.0, 2.0, 3.0]), np.array([5.0, 6.0, 1.0, 2.0])
    assert quality.frontier(sizes, values).tolist() == [0, 2]


def test_paired_ratio_of_a_run_with_itself_is_one() -> None:
    one = [synthetic("nash_lattice")]
    assert quality.paired_ratio(one, one) == pytest.approx((1, 1, 1))
    other = synthetic("fixed_no_nash")
    other.series["tokens"][0] = 7
    with pytest.raises(ValueError, match="different windows"):
        quality.paired_ratio([other], one)


def of_windows(method: str, kl: list[float], seed: int = 0, size: float = 1e6, **config: Any) -> Record:
    """A record of windows with these KL, of as many nats more than the full model's NLL."""
    one = synthetic(method, seed, **config)
    series = {"kl": kl, "nll": [FULL_NLL + value for value in kl], "tokens": [255.0] * len(kl)}
    return dataclasses.replace(one, series=series, metrics=one.metrics | {"bytes_file": size})


def test_tested_differences_that_survive_holm_are_marked() -> None:
    """Ten windows, all flips: p of a difference of one sign everywhere is 2/1024."""
    rng = np.random.default_rng(0)
    level = 0.1 + rng.random(10)
    noise = rng.permutation([-0.02, -0.01, 0.01, 0.02, 0, 0.005, -0.005, 0.03, -0.03, 0.001])
    kl = {"nash_lattice": level, "gptq": level + 0.01, "lattice_no_cache": level, "lattice_no_swarm": level + noise}
    records = [of_windows(method, values.tolist()) for method, values in kl.items()]
    means = frame.tested(frame.average(frame.frame(records)), records).set_index("method")
    assert means.loc["gptq", "kl_p"] == pytest.approx(6 * 2 / 1024)
    assert means.loc["gptq", "nll_delta_p"] == pytest.approx(6 * 2 / 1024)
    assert means.loc["lattice_no_cache", "kl_p"] == 1 and means.loc["lattice_no_swarm", "kl_p"] > 0.05
    assert np.isnan(means.loc["nash_lattice", "kl_p"])
    table = means.reset_index()
    shown = typeset.cells(table).set_index("method")["KL (nats)"]
    assert [typeset.MARK in shown[method] for method in kl] == [False, True, False, False]
    assert "the 6 tests of this table together (Holm)" in typeset.note(table)
    assert typeset.markdown(table).endswith(f"\n\n{typeset.note(table)}\n")
    assert r"$^\dagger$" in typeset.latex(table) and typeset.MARK not in typeset.latex(table)
    assert typeset.MARK in rendered(typeset.terminal(table))


def test_tested_with_more_methods_raises_p_values() -> None:
    """Six windows: p = 2/64 alone, and nothing beside other tests."""
    level = np.linspace(0.1, 0.2, 6)

    def p_of(*methods: str) -> float:
        values = {method: level + 0.01 for method in methods} | {"nash_lattice": level}
        records = [of_windows(method, kl.tolist()) for method, kl in values.items()]
        for one in records:
            del one.series["nll"]
        means = frame.tested(frame.average(frame.frame(records)), records)
        return float(means.set_index("method").loc["gptq", "kl_p"])

    assert p_of("gptq") == pytest.approx(1 / 32) and p_of("gptq", "rtn") == pytest.approx(1 / 16)


def test_tested_reference_has_equal_overrides_and_text() -> None:
    level = np.linspace(0.1, 0.2, 6)
    shifts = {"gptq[bits=2]": 0.01, "nash_lattice[bits=2]": 0.0, "gptq[bits=3]": 0.01, "nash_lattice[bits=3]": 0.01}
    records = [of_windows(method, (level + shift).tolist()) for method, shift in shifts.items()]
    for one in records:
        del one.series["nll"], one.series["tokens"]  # as of examples of a task
    p_values = frame.tested(frame.average(frame.frame(records)), records).set_index("method")["kl_p"]
    assert p_values["gptq[bits=2]"] == pytest.approx(2 / 32) and p_values["gptq[bits=3]"] == 1
    elsewhere = [
        dataclasses.replace(one, config=one.config | {"dataset": {"sha256": one.labels["method"]}}) for one in records
    ]
    assert "kl_p" not in frame.tested(frame.average(frame.frame(elsewhere)), elsewhere)


def test_tested_without_reference_adds_no_p_value(records: list[Record]) -> None:
    others = [one for one in records if one.labels["method"] != "nash_lattice"]
    means = frame.average(frame.frame(others))
    assert "kl_p" not in frame.tested(means, others) and typeset.note(means) == f"Runs of commit {COMMIT[:7]}."
    assert typeset.markdown(frame.tested(means, others)) == typeset.markdown(means)


def test_paired_seeds_are_averaged_and_their_spread_is_shown() -> None:
    records = [of_windows("gptq", [kl] * 4, seed) for seed, kl in enumerate((0.1, 0.2, 0.6))]
    gptq_kl, first_seed_kl = frame.paired(records, records[:1], "kl")
    assert gptq_kl == pytest.approx([0.3] * 4) and first_seed_kl == pytest.approx([0.1] * 4)
    for one, kl in zip(records, (0.1, 0.2, 0.6), strict=True):
        one.metrics["kl"] = kl
    means = frame.average(frame.frame(records))
    assert means["kl_spread"][0] == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1))
    assert typeset.cells(means)["KL ± over seeds"][0] == "0.2646"
    assert "kl_spread" not in frame.average(frame.frame(records[:1]))


def test_equal_bytes_on_a_power_law_equals_hand_calculation() -> None:
    """KL of nash_lattice falls as 1 / bytes²: at 2 MB it is a quarter of that at 1 MB, whatever is in between."""
    text = np.random.default_rng(1).uniform(1, 2, 12)
    sizes = {1.0: 1e6, 4.0: 4e6, 3.0: 3e6}
    curve = [
        of_windows(f"nash_lattice[bits={bits}]", [*(text * (1e6 / size) ** 2).tolist(), 9.0], 0, size, bits=bits)
        for bits, size in sizes.items()
    ]
    for one in curve:  # of another experiment, on one window more
        one.labels["experiment"], one.config["method"]["name"] = "bit_budget", "nash_lattice"
    gptq_runs = [of_windows("gptq", (text * scale).tolist(), seed, 2e6) for seed, scale in enumerate((0.4, 0.6))]
    large = of_windows("uniform8", text.tolist(), size=5e6)
    table = tables.equal_bytes([*gptq_runs, *curve, large]).set_index("method")
    assert list(table.index) == ["uniform8", "gptq"]
    assert table.loc["gptq", "kl_at_bytes"] == pytest.approx(text.mean() / 4)
    ends = table.loc["gptq", ["kl_ratio", "kl_ratio_low", "kl_ratio_high"]].astype(float).tolist()
    assert ends == pytest.approx([0.5] * 3)
    assert np.isnan(table.loc["uniform8", "kl_ratio"])
    shown = typeset.cells(table.reset_index(), tables.EQUAL_BYTES)
    assert list(shown.iloc[:, -1]) == [MISSING, "0.500"]

    for alien in ("model", "dataset"):
        changed = [dataclasses.replace(one, config=one.config | {alien: {"sha256": "ef"}}) for one in curve[1:]]
        assert len(tables.equal_bytes([*gptq_runs, curve[0], *changed])) == 0, alien
    fewer = [of_windows(one.labels["method"], one.series["kl"][:9], size=9e5) for one in curve]
    assert len(tables.equal_bytes([*gptq_runs, *fewer])) == 0
    assert len(tables.equal_bytes(gptq_runs)) == 0


def test_layers_of_two_seeds_become_averaged_rows() -> None:
    records = []
    for seed in (0, 1):
        one = synthetic("nash_lattice", seed)
        one.series["layer_kl"], one.series["layer_nll_delta"] = [0.01, 0.03 + seed / 50], [-0.001, 0.02]
        names = ("wte", "c_fc")
        layers = [{"name": n, "parameters": 64, "bits_per_weight": 3.0, "damage": 0.02} for n in names]
        records.append(dataclasses.replace(one, layers=layers))
    table = tables.layers([*records, synthetic("gptq")])
    assert list(table["layer"]) == ["wte", "c_fc"] and table["layer_kl"].tolist() == pytest.approx([0.01, 0.04])
    shown = typeset.cells(table, tables.LAYERS)
    assert list(shown.columns[:2]) == ["method", "layer"]
    assert shown["KL alone (nats)"][0] == "1.0e-02" and shown["ΔNLL alone (nats)"][0] == "-1.0e-03"
    assert len(tables.layers([synthetic("gptq")])) == 0


def test_speed_contestants_of_a_record_become_rows() -> None:
    one = synthetic("gptq")
    one.labels["measure"] = "speed"
    one.series.update({f"decode_ms_{name}": [1.0, 2.0] for name in ("full", "int8", "bfloat16")})
    for suffix, decode in (("_full", 8.0), ("", 2.0), ("_bfloat16", 4.0)):
        one.metrics.update({f"decode_ms{suffix}": decode, f"bytes_resident{suffix}": 1e6 * decode})
        if suffix != "_full":
            for end, factor in (("", 1), ("_low", 0.5), ("_high", 2)):
                one.metrics[f"decode_ratio{suffix}{end}"] = factor * 8 / decode
    one.metrics["kl_int8"] = 0.25
    table = tables.speed([one, synthetic("uniform4")])
    assert table["contestant"].tolist() == ["full", "int8", "bfloat16"] and table["decode_ms"].tolist() == [8, 2, 4]
    shown = typeset.cells(table, tables.SPEED)
    assert list(shown.columns[:2]) == ["method", "contestant"] and "× prefill" not in shown
    assert shown["× decode"].tolist() == [MISSING, "4.00 [2.00, 8.00]", "2.00 [1.00, 4.00]"]
    assert shown["KL"].tolist() == [MISSING, "0.2500", MISSING]


def test_pareto_baseline_without_damage_stays_on_the_log_axis(records: list[Record]) -> None:
    axes = quality.pareto(frame.average(frame.frame(records))).axes[0]
    low, high = axes.get_ylim()
    assert 0 < low < min(value for value in KL.values() if value > 0) < high
    assert any("baseline (KL about 0)" in label.get_text() for label in axes.texts)


def test_pareto_labels_of_many_methods_do_not_overlap(records: list[Record]) -> None:
    figure = quality.pareto(frame.average(frame.frame(records)))
    boxes = [label.get_window_extent() for label in figure.axes[0].texts if label.get_text()]
    assert len(boxes) == len(ABLATION)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_figures_without_needed_records_raise_naming_them() -> None:
    baseline = [synthetic("baseline")]
    with pytest.raises(ValueError, match="no record has sweeps"):
        games.convergence(baseline)
    with pytest.raises(ValueError, match="no record of nash_lattice"):
        quality.ablation(baseline)


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
def test_scripts_run_twice_write_equal_files(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    options = ["--records", str(folder), "--experiment", "ablation", "--paper", str(tmp_path / "paper")]
    assert script("tables").main([*options, "--out", str(tmp_path / "tables")]) == 0
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"ablation.md", "ablation.csv", "ablation.tex"}
    assert {path.name for path in (tmp_path / "paper").iterdir()} == {"ablation.tex", "numbers.tex"}

    names = [f"ablation_{name}" for name in ("pareto", "perplexity", "accuracy", "ablation", "convergence", "bits")]
    assert script("figures").main([*options, "--out", str(tmp_path / "one")]) == 0
    assert script("figures").main([*options[:-2], "--out", str(tmp_path / "two")]) == 0
    for name in names:
        for suffix in (".pdf", ".png"):
            first, second = ((tmp_path / out / f"{name}{suffix}").read_bytes() for out in ("one", "two"))
            assert first == second, f"{name}{suffix} differs between two runs"


def test_tables_script_of_all_experiments_removes_stale_tables(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    derived = ["ablation.csv", "ablation.md", "ablation.tex"]
    stale = [f"{name}{suffix}" for name in ("gone", "gone_layers", "equal_bytes") for suffix in (".md", ".csv", ".tex")]
    others = ["audit.md", "audit.tex", "notes.csv", "resources.md"]
    for name in (*stale, *others):
        (tmp_path / name).touch()
    options = ["--records", str(folder), "--out", str(tmp_path)]
    assert script("tables").main([*options, "--experiment", "ablation"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*derived, *stale, *others])
    assert script("tables").main(options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*derived, *others])


def test_scripts_without_records_fail_in_one_sentence(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("tables").main(["--records", str(folder), "--experiment", "main"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "no record has experiment=main" in message
    for name in ("tables", "figures"):
        assert script(name).main(["--records", str(tmp_path), "--out", str(tmp_path / "out")]) == 1


@pytest.mark.slow
def test_tables_script_as_a_command_fails_in_one_sentence(folder: pathlib.Path) -> None:
    command = [sys.executable, "scripts/tables.py", "--records", str(folder), "--experiment", "main"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no record has experiment=main" in done.stderr


def test_summary_script_with_failed_job_returns_one(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = next(folder.glob("*.json"))
    jobs = [outcome("finished", "uniform4", path), outcome("failed", "hqq", message="boom")]
    for number, job in enumerate(jobs):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "outcome.json").write_text(json.dumps(job))
    assert script("summary").main([str(tmp_path)]) == 1
    (tmp_path / "1" / "outcome.json").unlink()
    assert script("summary").main([str(tmp_path)]) == 0
    (tmp_path / "1" / ".hydra").mkdir()
    assert script("summary").main([str(tmp_path)]) == 1, "a job that was killed counts as failed"
    assert script("summary").main([str(tmp_path / "1")]) == 1
