"""What the tests of reporting share: committed records, read once, and statistics of few resamples."""

import contextlib
import pathlib
from collections.abc import Iterator

import pytest

from nashswarm.records import record, statistics
from nashswarm.records.record import Record
from nashswarm.reporting.audit.evidence import Evidence, gather

RECORDS = pathlib.Path(__file__).parents[2] / "results" / "records"


@pytest.fixture(scope="session")
def committed_records() -> list[Record]:
    """All committed records; not to be changed."""
    return list(record.read_all(RECORDS))


@contextlib.contextmanager
def few_statistics() -> Iterator[None]:
    """Compute intervals and tests from few resamples, for assertions that read no interval and no p-value."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 50)
        patch.setattr(statistics, "FLIPS", 199)
        yield


@pytest.fixture
def few_resamples() -> Iterator[None]:
    """Run the test with ``few_statistics``."""
    with few_statistics():
        yield


@pytest.fixture(scope="session")
def evidence() -> Evidence:
    """The evidence of the committed records; intervals at equal bytes and p-values are from few resamples.

    No assertion reads them: verdicts on runs come from the intervals that the records hold.
    """
    with few_statistics():
        return gather(RECORDS)
