"""What the tests of attention share: memory in which a number that was left out shows."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill memory that nothing was written to with NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    assert torch.empty_like(torch.zeros(2, 4)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
