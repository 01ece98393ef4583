"""What the tests of faults share."""

from collections.abc import Iterator

import pytest
from fault_table import FaultsRecord


@pytest.fixture
def faults_record(request: pytest.FixtureRequest) -> Iterator[FaultsRecord]:
    """Return what counts the faults of a test by kind for the table at the end of the session; a fault that
    was lost fails the test, should its own assertions not."""
    record = FaultsRecord(request.node)
    yield record
    assert not record.lost, f"faults lost, by kind: {record.lost}"
