"""Tensors that wait on a drive, written and read by threads of their own in pieces.

A piece goes through one of a few staging buffers, so what this takes of host memory does not grow with the
sequence; on a CPU it goes straight from and to the tensor. Ordinary buffered file access: the page cache may
keep what fits, and gives it up when memory is short. Nothing is synced, since nothing outlives the process.

Files have no name in the folder (``O_TMPFILE``): however the process ends, they are gone. Their bytes are
reserved when a file is made, so that a full drive says so before the step, not in the middle of one.
"""

import errno
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, cast

import torch

from sparse_llama.distributed.dataless import holds_data
from sparse_llama.errors import OffloadError
from sparse_llama.memory.offload import OffloadEngine, Transfer
from sparse_llama.memory.offload_host import HostBuffer
from sparse_llama.memory.offload_slots import Lease, Slots
from sparse_llama.memory.offload_stream import Copied, SideStream

NUM_THREADS = 4
"""Enough requests in flight for a drive's full rate; a thread is in the kernel, or waits for the device."""
PIECE_BYTES = 32 * 2**20
"""Long against the 20 us of a request and of a copy's launch; the staging buffers are NUM_THREADS of it."""


class DriveFile:
    """A file without a name."""

    def __init__(self, num_bytes: int, folder: Path) -> None:
        self.num_bytes = num_bytes
        self._folder = folder
        self._file: BinaryIO | None = None

    def reserve(self) -> None:
        """Make the file and reserve its bytes, once.

        Raises:
            OffloadError: the folder or the drive does not let us.
        """
        if self._file is not None:
            return
        try:
            file = cast(BinaryIO, tempfile.TemporaryFile(buffering=0, dir=self._folder))  # noqa: SIM115
            try:
                if self.num_bytes > 0:
                    os.posix_fallocate(file.fileno(), 0, self.num_bytes)
            except OSError:
                file.close()
                raise
        except OSError as error:
            raise _drive_error(self._folder, error, self.num_bytes) from error
        self._file = file

    def write(self, piece: torch.Tensor, offset: int) -> None:
        """Write (bytes,) uint8 host memory at ``offset``."""
        assert self._file is not None
        view = memoryview(cast(Any, piece.numpy()))
        while view:  # the kernel takes at most 2 GiB at once, and less when interrupted
            written = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[written:], offset + written

    def read(self, piece: torch.Tensor, offset: int) -> None:
        """Fill (bytes,) uint8 host memory from ``offset``."""
        assert self._file is not None
        view = memoryview(cast(Any, piece.numpy()))
        while view:
            count = os.preadv(self._file.fileno(), [view], offset)
            if count == 0:
                raise OSError("the file ended early")
            view, offset = view[count:], offset + count

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()


class _Piece:
    """One piece of a tensor, to be written to its file or read from it by a thread."""

    def __init__(
        self,
        lease: Lease[DriveFile],
        memory: torch.Tensor,
        offset: int,
        device: tuple[torch.cuda.Stream, "SimpleQueue[HostBuffer]"] | None,
    ) -> None:
        self._held: tuple[Lease[DriveFile], torch.Tensor] | None = (lease, memory)
        self._offset, self._device = offset, device

    def send(self) -> None:
        self._move(is_read=False)

    def receive(self) -> None:
        self._move(is_read=True)

    def _move(self, *, is_read: bool) -> None:
        # Let go of by the time the result is there, not when the thread finds time to drop its task: whoever
        # waits for the result counts on the memory and on the place.
        assert self._held is not None
        (lease, memory), self._held = self._held, None
        if self._device is None:
            (lease.slot.read if is_read else lease.slot.write)(memory, self._offset)
            return
        stream, idle = self._device
        buffer = idle.get()
        try:
            staged = buffer.like(memory)
            if is_read:
                lease.slot.read(staged, self._offset)
                _copy_now(memory, staged, stream)
            else:
                _copy_now(staged, memory, stream)
                lease.slot.write(staged, self._offset)
        finally:
            idle.put(buffer)


class _Pieces:
    """A tensor's pieces under way; its memory and its file are held by whoever copies."""

    def __init__(self, futures: list[Future[None]], folder: Path) -> None:
        self._futures, self._folder = futures, folder

    def wait(self) -> None:
        try:
            for future in self._futures:
                future.result()
        except OSError as error:
            raise _drive_error(self._folder, error) from error

    def abandon(self) -> None:
        pass


class DriveOffload(OffloadEngine):
    """Tensors wait in nameless files of a folder.

    Args:
        folder: on a drive with room for all of them at once.

    Tensors without data (``holds_data``) are only counted: no thread, no file.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(Slots(lambda num_bytes: DriveFile(num_bytes, folder)))
        self._folder = folder
        self._stream = SideStream()
        self._staging: list[HostBuffer] = []
        self._idle: SimpleQueue[HostBuffer] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def check(self) -> None:
        """Make sure that a file can be made in the folder.

        Raises:
            OffloadError: it cannot.
        """
        DriveFile(0, self._folder).reserve()

    @property
    def host_bytes(self) -> int:
        """Bytes of the staging buffers: none while the device is the CPU."""
        return sum(buffer.num_bytes for buffer in self._staging)

    @property
    def drive_bytes(self) -> int:
        """Bytes of all files."""
        return self._slots.num_bytes

    def _write(self, lease: Lease[DriveFile], source: torch.Tensor) -> Transfer:
        if holds_data(source):
            lease.slot.reserve()
        return self._start(_Piece.send, lease, source)

    def _read(self, lease: Lease[DriveFile], target: torch.Tensor) -> Transfer:
        return self._start(_Piece.receive, lease, target)

    def _start(
        self, move: Callable[[_Piece], None], lease: Lease[DriveFile], tensor: torch.Tensor
    ) -> Transfer:
        if tensor.device.type != "cpu" and not self._staging:
            self._make_staging(tensor)
        if not holds_data(tensor):
            return Copied()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="drive")
        device = (self._stream.behind_computation(tensor.device), self._idle) if tensor.is_cuda else None
        pieces = tensor.view(-1).view(torch.uint8).split(PIECE_BYTES)
        futures = [
            self._threads.submit(move, _Piece(lease, memory, index * PIECE_BYTES, device))
            for index, memory in enumerate(pieces)
        ]
        return _Pieces(futures, self._folder)

    def _make_staging(self, tensor: torch.Tensor) -> None:
        for _ in range(NUM_THREADS):
            buffer = HostBuffer(PIECE_BYTES)
            if tensor.is_cuda:
                buffer.pin()
            self._staging.append(buffer)
            self._idle.put(buffer)


def _copy_now(target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        stream.record_event().synchronize()


def _drive_error(folder: Path, error: OSError, num_bytes: int | None = None) -> OffloadError:
    what = "layer inputs" if not num_bytes else f"a layer input of {num_bytes / 2**20:,.1f} MiB"
    reason = (error.strerror or str(error)).lower()
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return OffloadError(
        f"sparse_llama.memory.checkpoint_nvme_path: {folder} cannot hold {what} ({reason}); "
        f"{'make room' if is_full else 'make it a folder that takes files'}, name another with --nvme_path, "
        "or keep them in host memory with --checkpointing cpu"
    )
