"""Host memory of exactly the bytes asked for, pinned if a CUDA device copies to it."""

import math
import sys
from typing import Any

import torch

from sparse_llama.errors import OffloadError


class HostBuffer:
    """Bytes in host memory.

    torch's pinned allocator rounds every block up to a power of two: 200,000 tokens of 8,192 bytes become
    2.15 GB for 1.64. Here ordinary memory is registered with the driver, which pins just its pages.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.data = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        self._is_pinned = False

    def pin(self) -> None:
        """Pin the buffer, once; a CUDA device then copies to and from it while the host goes on.

        Raises:
            OffloadError: the driver cannot, which it says when host memory is short.
        """
        if self._is_pinned or self.num_bytes == 0:
            return
        runtime: Any = torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(self.data.data_ptr(), self.num_bytes, 0))
        if status != 0:
            raise OffloadError(
                f"activation_checkpointing.cpu_checkpointing: the CUDA driver cannot pin "
                f"{self.num_bytes / 2**30:.2f} GiB more of host memory (error {status}); keep fewer inputs "
                "with --number_checkpoints, or move them to a drive with --checkpointing nvme"
            )
        self._is_pinned = True

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the buffer's first bytes as a tensor of the same shape and dtype."""
        num_bytes = math.prod(tensor.shape) * tensor.element_size()
        return self.data[:num_bytes].view(tensor.dtype).view(tensor.shape)

    def __del__(self) -> None:
        if getattr(self, "_is_pinned", False) and not sys.is_finalizing():
            torch.cuda.synchronize()  # a copy may be under way
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self.data.data_ptr())
