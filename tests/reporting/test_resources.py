"""What compressing takes: the committed table follows from records and shapes."""

import dataclasses
import pathlib

import pytest

from nashswarm.models.shapes import SHAPES
from nashswarm.records.record import Record
from nashswarm.reporting import resources

ROOT = pathlib.Path(__file__).parents[2]
COMMITTED = (ROOT / "results/tables/resources.md").read_text()
NO_CHECKPOINT = {"local", "hub", "minilm", "smollm2_135m"}  # anyone's, packages'
NO_CHECKPOINT |= {"moe_small", "moe_small64", "moe_fine64"}  # untrained


def test_measured_rows_of_committed_records_equal_the_table(committed_records: list[Record]) -> None:
    rows = resources.measured_rows(committed_records)
    assert {f"`{name}`" for name in ("default", "gpt2_random")} <= {row[0] for row in rows}
    assert "".join(f"| {' | '.join(row)} |\n" for row in rows) in COMMITTED


def test_measured_rows_of_cached_runs_are_left_out(committed_records: list[Record]) -> None:
    measured_run = next(
        one
        for one in committed_records
        if one.labels["method"] == "lattice_no_cache" and one.metrics.get("quantize_peak_bytes")
    )
    cached_run = dataclasses.replace(
        measured_run, provenance=dict(measured_run.provenance) | {"cache_hits": ["baseline", "game"]}
    )
    assert len(resources.measured_rows([measured_run, cached_run])) == 1
    with pytest.raises(ValueError, match="no record tells what compression took"):
        resources.measured_rows([cached_run])


def test_experiments_of_committed_records_have_a_row_each(committed_records: list[Record]) -> None:
    rows = resources.experiments(committed_records).splitlines()[2:]
    assert sorted(path.name for path in (ROOT / "results/records").iterdir()) == [row.split("`")[1] for row in rows]
    two = [dataclasses.replace(committed_records[0], metrics={"seconds": seconds}) for seconds in (60.0, 90.0)]
    assert "| 2 | 2.5 | 1.5 |" in resources.experiments(two)


def test_committed_table_has_a_row_for_every_model_of_conf() -> None:
    for name in {path.stem for path in (ROOT / "conf/model").glob("*.yaml")} | set(SHAPES):
        assert name in NO_CHECKPOINT or f"| `{name}` |" in COMMITTED, name


def test_shape_row_of_tiny_model_equals_hand_calculation() -> None:
    """A LLaMA of one block, as wide as a group: parameters 2·64·64 + 4·64·64 + 3·64·64 + 3·64."""
    tiny = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    row = resources.shape_row("tiny", tiny | {"num_hidden_layers": 1, "num_attention_heads": 1})
    count = 9 * 64 * 64 + 3 * 64
    assert row[:3] == ("`tiny`", f"{count:,}", resources.gigabytes(4 * count))
    assert row[3:5] == (resources.gigabytes(3 * count / 8), resources.gigabytes(8 * count))
    assert float(row[5]) < float(row[2]) < float(row[6])  # small in the file, states of the windows in memory


@pytest.mark.slow
def test_markdown_of_committed_records_equals_committed_table(committed_records: list[Record]) -> None:
    assert resources.markdown(committed_records) == COMMITTED
    assert resources.experiments(committed_records) == (ROOT / "results/tables/experiments.md").read_text()
