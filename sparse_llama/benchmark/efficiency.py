"""How near block-sparse attention comes to what its density promises, and what keeps it from there.

    efficiency = T_dense / T_sparse x density        1: every token pair as fast as dense flash attention's
               = kernel x tile x schedule

    kernel     T_dense / T_causal: the same code on the full causal layout, without PyTorch's shortcut for it
    tile       pairs that attend / pairs that are computed, counted
    schedule   the rest: gathering, merging, short calls, imbalance

Each below 1 names what to work on. The rest may be above 1: the causal run has losses of its own.
"""

from dataclasses import dataclass
from typing import Literal

Pass = Literal["forward", "backward", "both"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "both")


@dataclass(frozen=True)
class Efficiency:
    """An efficiency and its three factors."""

    total: float
    kernel: float
    tile: float
    schedule: float


def split_efficiency(
    *, dense_ms: float, sparse_ms: float, causal_ms: float, density: float, utilisation: float
) -> Efficiency:
    """Return the efficiency of one pass.

    Args:
        dense_ms: of the best dense kernel.
        causal_ms: of the measured code on the full causal layout.
        density: share of the causal token pairs that attend.
        utilisation: share of the computed pairs that attend.
    """
    total = dense_ms / sparse_ms * density
    kernel = dense_ms / causal_ms
    return Efficiency(total, kernel, utilisation, total / (kernel * utilisation))


def mean_utilisation(parts: list[tuple[float, float]]) -> float:
    """Return the utilisation of several kernels as one, from each (share of the useful work, utilisation).

    A kernel that does w useful products computes w / utilisation.
    """
    return sum(work for work, _ in parts) / sum(work / utilisation for work, utilisation in parts)
