"""Tensors that wait for the backward pass elsewhere: in host memory, or on a drive.

One engine serves whatever keeps a layer's input: a checkpointed layer, the first of a nested group, and a
layer that is one autograd function. ``store`` sends a tensor away and returns a ticket, ``load`` brings it
back; the ticket's lifetime is the tensor's, so a graph that is thrown away, used twice or cut short by an
error needs no word to the engine.

What the device holds beside the computation is bounded, since it is the device's queue that waits for copies:

* on the way out one tensor: the next ``store`` waits for the last one's copy, then lets go of it. A copy
  takes 0.33 us per token at 25 GB/s, a layer's forward pass 2.2 us per token at 187 TFLOP/s (7B, bf16);
* on the way in one tensor: ``load`` starts to fetch what was stored before, so that it arrives during the
  backward pass of the layer at hand;
* the last one stored has not left yet when the backward pass asks for it, and makes no journey.

DeepSpeed 0.19.8 has an engine of its own for this, ``CheckpointHiddenStatesOffload``
(deepspeed/runtime/activation_checkpointing/offload_activations.py), the baseline of the benchmarks. Ours
differs:

* it runs on every device, so that CPU tests cover it and a planner can run it on tensors without data; theirs
  moves nothing on a CPU;
* it is given the tensor, where theirs replaces ``GradientCheckpointingLayer.__call__`` for all models while a
  step runs and must be entered around forward and backward;
* nested groups, and layers that are no torch checkpoint, keep their input with it too; and a drive takes
  what host memory cannot;
* it frees device memory at a known point. Theirs uses ``record_stream`` both ways: the allocator gets bytes
  back when the device is done, by which time the host, running ahead, has asked for more;
* it fetches one input ahead. Theirs starts when the input is asked for, on a stream that does not wait for
  the computation: as far ahead as the host runs, with as much memory;
* host memory is the tensors' bytes, not what an allocator rounds them to.

Both take the lowest layer's input, which requires no gradient.
"""

import weakref
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch

from sparse_llama.memory.offload_host import HostBuffer
from sparse_llama.memory.offload_slots import Lease, Slots
from sparse_llama.memory.offload_stream import SideStream


def host_bytes_for(tensor_bytes: int, count: int) -> int:
    """Return the host bytes that ``count`` tensors of ``tensor_bytes`` take at once in a ``HostOffload``.

    The rule is the product: every tensor has a buffer of exactly its size, pinned where it lies. torch's own
    pinned allocator rounds a block up to a power of two, up to twice as much. (The operating system counts in
    pages: at most 8 KiB more per tensor.)
    """
    return tensor_bytes * count


class Transfer(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Order what the current stream does next after the copy."""
        ...

    def abandon(self) -> None:
        """See to it that nobody is given the memory that is written to before the copy is over."""
        ...


class Stored:
    """A ticket for a tensor that is elsewhere; when nobody holds it any more its place is free."""

    def __init__(self, source: torch.Tensor, lease: Lease[Any], previous: "Stored | None") -> None:
        self.shape, self.dtype, self.device = source.shape, source.dtype, source.device
        self.lease = lease
        self.source: torch.Tensor | None = source
        """The tensor itself until it has left."""
        self.leaving: Transfer | None = None
        self.arriving: tuple[torch.Tensor, Transfer] | None = None
        self._previous = None if previous is None else weakref.ref(previous)

    @property
    def previous(self) -> "Stored | None":
        """What was stored before this and is still wanted: a backward pass asks for it next."""
        return None if self._previous is None else self._previous()

    def depart(self) -> None:
        """Let go of the tensor once its copy is over."""
        if self.source is not None:
            assert self.leaving is not None
            self.leaving.wait()
            self.source = self.leaving = None

    def __del__(self) -> None:
        if self.arriving is not None:
            self.arriving[1].abandon()


class OffloadEngine(ABC):
    """Sends tensors away and brings them back; not for two threads at a time."""

    def __init__(self, slots: Slots[Any]) -> None:
        self._slots = slots
        self.num_stored = 0
        self.stored_bytes = 0
        self.loaded_bytes = 0
        """Brought back; what had not left yet is not counted."""
        self._last: weakref.ref[Stored] | None = None

    def store(self, tensor: torch.Tensor) -> Stored:
        """Return a ticket for ``tensor``, which must not change until it has left; its gradient history stays
        behind.

        Raises:
            OffloadError: there is no room for it, or an earlier one could not be written.
        """
        source = tensor.detach().contiguous()
        last = None if self._last is None else self._last()
        self._last = None  # a write that failed is reported once
        if last is not None:
            last.depart()
        stored = Stored(source, self._slots.take(source.nbytes), last)
        stored.leaving = self._write(stored.lease, source)
        self._last = weakref.ref(stored)
        self.num_stored += 1
        self.stored_bytes += source.nbytes
        return stored

    def load(self, stored: Stored) -> torch.Tensor:
        """Return the stored tensor on its device, contiguous; any number of times.

        Raises:
            OffloadError: it could not be written, or cannot be read.
        """
        if stored.source is not None:
            assert stored.leaving is not None
            stored.leaving.wait()
            tensor = stored.source
        else:
            tensor, transfer = stored.arriving or self._fetch(stored)
            transfer.wait()
            stored.arriving = None
        previous = stored.previous
        if previous is not None and previous.source is None and previous.arriving is None:
            previous.arriving = self._fetch(previous)
        return tensor

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the engine holds, in use or not."""
        return 0

    @property
    def drive_bytes(self) -> int:
        """Bytes on the drive that the engine holds, in use or not."""
        return 0

    def _fetch(self, stored: Stored) -> tuple[torch.Tensor, Transfer]:
        target = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
        self.loaded_bytes += target.nbytes
        return target, self._read(stored.lease, target)

    @abstractmethod
    def _write(self, lease: Lease[Any], source: torch.Tensor) -> Transfer: ...

    @abstractmethod
    def _read(self, lease: Lease[Any], target: torch.Tensor) -> Transfer: ...


class HostOffload(OffloadEngine):
    """Tensors wait in host memory: in pinned buffers of their size, copied on a stream of their own, where
    the device is a CUDA one.

    Buffers are made when they are first needed and used again from then on; one too small for a longer
    micro-batch is replaced.
    """

    def __init__(self) -> None:
        super().__init__(Slots(HostBuffer))
        self._stream = SideStream()

    @property
    def host_bytes(self) -> int:
        """Bytes of all buffers; ``host_bytes_for`` says beforehand how many."""
        return self._slots.num_bytes

    def _write(self, lease: Lease[HostBuffer], source: torch.Tensor) -> Transfer:
        if source.is_cuda:
            lease.slot.pin()
        return self._stream.copy(lease.slot.like(source), source)

    def _read(self, lease: Lease[HostBuffer], target: torch.Tensor) -> Transfer:
        return self._stream.copy(target, lease.slot.like(target))
