"""What the benchmark of sweeps tells of what it measured."""

from experiments.benchmarks import sweeps


def test_markdown_of_rounds_has_medians_ranges_and_both_goals() -> None:
    found = {
        "runs": 5,
        "sweep": "experiment=ablation",
        "idle": {
            "first, disabled": [7.0, 8.0, 9.0],
            "each, disabled": [1.5, 1.0, 2.0],
            "first, offline": [9.0, 9.0, 9.0],
            "each, offline": [4.0, 3.0, 2.0],
            "by hand": [0.5, 0.25, 0.75],
        },
        "seconds": {"one after the other": [100.0, 120.0], "two processes": [50.0, 80.0]},
        "machine": "an abacus",
        "provenance": {"commit": "00a838f", "dirty": False},
    }
    text = sweeps.markdown(found)
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| "))
    added = "what the framework adds to a run, `wandb={}`"
    assert rows[added.format("disabled")] == "1.00 (0.75 to 1.25) | at most 2.0"
    assert rows[added.format("offline")] == "2.75 (1.25 to 3.50) | at most 2.0"  # round by round
    assert rows["times faster"] == "1.75 (1.50 to 2.00) | at least 1.6"
    assert rows["the same, two processes"] == "65.0 (50.0 to 80.0)"
    assert "Commit 00a838f; an abacus; one thread a process" in text
