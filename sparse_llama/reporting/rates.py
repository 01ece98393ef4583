"""What GPUs are taken to achieve: the constants of every time that is computed instead of measured.

Peaks are the makers' (bf16 with fp32 accumulation, dense); shares of them are what well-tuned kernels reach:
cuBLAS about 0.74 on an A100, FlashAttention-2 0.63 forward and 0.54 backward, block-sparse kernels less. An
eager LLaMA layer spends a fifth of its time on element-wise operations, which the memory's rate bounds: with
it an A100 achieves about 185e12 of its 312e12 over a whole layer without attention.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Of one GPU; floating-point operations and bytes a second."""

    name: str
    linear: float
    """Matrix products."""
    dense: tuple[float, float]
    """Flash attention, forward and backward."""
    sparse: tuple[float, float]
    """Block-sparse attention, blocks of 64 and more."""
    memory: float
    """The GPU's own memory, for element-wise operations."""
    bus: float
    """To and from pinned host memory, each way at once."""
    disk: float = 3e9
    """An NVMe drive, reading and writing together."""


A100 = Rates("A100", 230e12, (195e12, 170e12), (160e12, 120e12), memory=1.5e12, bus=25e9)
H100 = Rates("H100", 620e12, (600e12, 500e12), (380e12, 270e12), memory=3.3e12, bus=50e9)
RTX_4090 = Rates("RTX 4090", 122e12, (103e12, 90e12), (85e12, 63e12), memory=1.0e12, bus=25e9)
"""Peak 165e12; the A100's shares of it."""

RATES = {"a100": A100, "h100": H100, "rtx4090": RTX_4090}


def rates_of(device_name: str) -> Rates | None:
    """Return the rates of the GPU that PyTorch calls ``device_name``; None where it is none of these."""
    plain = device_name.lower().replace(" ", "")
    return next((rates for name, rates in RATES.items() if name in plain), None)
