"""What a check finds, and what all of them come to."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "none"]
"""Green, yellow and red; none is a fact that is neither good nor bad."""


@dataclass(frozen=True)
class Finding:
    """One row."""

    name: str
    status: Status
    found: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""
    varies: bool = False
    """Whether ``found`` differs from rank to rank, and from time to time, without a meaning."""


def count(findings: Iterable[Finding], status: Status) -> int:
    """Return how many have a status."""
    return sum(finding.status == status for finding in findings)
