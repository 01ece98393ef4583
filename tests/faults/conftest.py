"""What the tests of faults share."""

from collections.abc import Iterator

import pytest
from fault_table import FaultsRecord
from faults.nursery import Nursery
from rank_processes import process_environment
from training.conftest import workplace  # noqa: F401 - a fixture


@pytest.fixture
def faults_record(request: pytest.FixtureRequest) -> Iterator[FaultsRecord]:
    """Return what counts the faults of a test by kind for the table at the end of the session; a fault that
    was lost fails the test, should its own assertions not."""
    record = FaultsRecord(request.node)
    yield record
    assert not record.lost, f"faults lost, by kind: {record.lost}"


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """The process that starts training jobs."""
    made = Nursery(process_environment())
    yield made
    made.close()
