"""Memory that ran out: recognised wherever it was raised, and described by what can be read at that moment.

What is described is the moment after the failed allocation: the interpreter still holds the locals of every
frame, so that nothing that Python can name has been freed.
"""

import errno
import re
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from inspect import unwrap
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch import nn

from sparse_llama.data.batches import Batch
from sparse_llama.data.packing import IGNORED
from sparse_llama.data.prepare import prepare_data
from sparse_llama.errors import OutOfMemoryError
from sparse_llama.evaluation.exact_match import exact_match
from sparse_llama.generation import generate_batch
from sparse_llama.model.assemble import assemble
from sparse_llama.training.engine import start_engine
from sparse_llama.training.held import LIBRARIES, held_bytes
from sparse_llama.training.host_memory import private_bytes, private_limit_bytes, resident_bytes
from sparse_llama.training.moment import BACKWARD, FORWARD, UPDATE, Moment

REST = "activations and the rest"
_CPU = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory): you tried to allocate (\d+)"
)
_OTHER = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|"
    r"std::bad_alloc|bad allocation|[Cc]annot allocate memory"
)
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB|TiB)"
_ASKED = re.compile(rf"(?:Tried|Unable) to allocate {_SIZE}")
_ALLOCATED = re.compile(rf"Of the allocated memory {_SIZE} is allocated by PyTorch")
_RESERVED = re.compile(rf"and {_SIZE} is reserved by PyTorch but unallocated")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_CALLS: dict[CodeType, str] = {
    unwrap(call).__code__: phase
    for call, phase in (
        (prepare_data, "reading the data"),
        (assemble, "loading the model"),
        (start_engine, "starting DeepSpeed's engine"),
        (exact_match, "generating answers"),
        (generate_batch, "generating answers"),
    )
}
"""Calls whose frames name the phase better than the loop can."""


@dataclass(frozen=True)
class FailedBatch:
    """The micro-batch that was being worked on."""

    num_rows: int
    num_tokens: int
    """Of a row."""
    num_documents: int
    longest_document: int
    """Tokens."""
    num_labelled: int


@dataclass(frozen=True)
class Shortage:
    """What is known of memory that ran out; plain data, which holds no tensor."""

    place: Literal["gpu", "host"]
    message: str
    """The allocator's own words, their first sentence."""
    asked_bytes: int | None
    """What was asked for and not there; None where the allocator does not say."""
    held: dict[str, int]
    """Bytes by component when it was asked for."""
    limit_bytes: int | None
    """What this process may have there; None is all that the machine has."""
    limit_name: str
    phase: str
    module: str | None
    """The innermost module whose forward pass, or recomputation, was running."""
    step: int
    """The step that was being made, where there is a batch; otherwise the last one; 0 is none."""
    batch: FailedBatch | None
    rank: int = 0
    checkpoint: Path | None = None
    """The newest there is."""
    is_saved_now: bool = False
    """Whether that checkpoint was written after memory ran out, with every finished step in it."""

    @property
    def held_bytes(self) -> int:
        return sum(self.held.values())

    @property
    def where(self) -> str:
        """The phase, with the step and the module where they are known."""
        is_in_step = self.batch is not None or self.phase in (FORWARD, BACKWARD, UPDATE)
        step = f"{' of' if is_in_step else ' after'} step {self.step}" if self.step else ""
        return f"{self.phase}{step}" + (f", in {self.module}" if self.module else "")

    def to_json(self) -> dict[str, Any]:
        """Return what ``retries.json`` holds of it."""
        return asdict(self) | {"checkpoint": None if self.checkpoint is None else str(self.checkpoint)}


class RunOutOfMemoryError(OutOfMemoryError):
    """A run's memory ran out; ``shortage`` says all that is known of it."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(f"out of memory: {shortage.where}")
        self.shortage = shortage


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out on a GPU or on the host, in ``error`` or in what caused it."""
    return any(_is_one(cause) for cause in _causes(error))


def describe(
    error: BaseException,
    moment: Moment,
    *,
    model: nn.Module | None,
    engine: Any,
    baseline_bytes: int | None,
    rank: int,
) -> Shortage:
    """Return what can be known of ``error`` now, while its frames are alive.

    Args:
        model: as far as it is there; the names of its modules are what a user reads.
        baseline_bytes: private memory of the process before the run began: Python and its libraries.
    """
    cause = next(one for one in _causes(error) if _is_one(one))
    message = str(cause)
    asked = _asked_bytes(message)
    place = "gpu" if isinstance(cause, torch.OutOfMemoryError) or "CU" in message else "host"
    frames = [frame for one in reversed(list(_causes(error))) for frame in _frames(one)]
    parts = {} if model is None else held_bytes(model, engine, "cuda" if place == "gpu" else "cpu")
    if place == "gpu":
        held, limit, limit_name = _held_on_gpu(message, parts)
    else:
        held, limit, limit_name = _held_on_host(asked, parts, baseline_bytes)
    return Shortage(
        place=place,
        message=_first_sentence(message) or type(cause).__name__,
        asked_bytes=asked,
        held=held,
        limit_bytes=limit,
        limit_name=limit_name,
        phase=next((_CALLS[frame.f_code] for frame in frames if frame.f_code in _CALLS), moment.phase),
        module=None if model is None else _module(frames, model),
        step=moment.step,
        batch=None if moment.batch is None else _batch(moment.batch),
        rank=rank,
    )


def release(error: BaseException) -> None:
    """Drop what the frames of ``error`` and of its causes hold, so that there is room to act."""
    for one in _causes(error):
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _held_on_gpu(message: str, parts: dict[str, int]) -> tuple[dict[str, int], int, str]:
    allocated = _size(_ALLOCATED, message) or torch.cuda.memory_allocated()
    held = dict(parts)
    held[REST] = max(allocated - sum(parts.values()), 0)
    held["reserved by PyTorch, in pieces too small"] = _size(_RESERVED, message) or 0
    free, total = torch.cuda.mem_get_info()
    held["CUDA's own, and other processes"] = max(total - free - torch.cuda.memory_reserved(), 0)
    share = torch.cuda.get_per_process_memory_fraction()
    name = "the GPU's memory" if share == 1.0 else f"{share:.2f} of the GPU's memory"
    return held, int(total * share), name


def _held_on_host(
    asked: int | None, parts: dict[str, int], baseline: int | None
) -> tuple[dict[str, int], int | None, str]:
    """Return components, limit and its name; of private memory, which is what a limit is about.

    Buffers of the backward pass in flight are gone by now, but the kernel refused ``asked`` bytes because
    they and what was held exceeded the limit: so at least the difference was held.
    """
    limit, now = private_limit_bytes(), private_bytes()
    held_now = resident_bytes() if now is None else now
    if limit is not None and asked is not None:
        held_now = max(held_now, limit - asked)
    held = dict(parts)
    rest = held_now - sum(parts.values()) - (baseline or 0)
    held[REST] = max(rest, 0)
    if baseline is not None:
        held[LIBRARIES] = baseline
    if limit is not None:
        return held, limit, "RLIMIT_DATA, see ulimit -d"
    return held, None, "the host's memory"


def _is_one(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_library = isinstance(error, RuntimeError) or "safetensors" in type(error).__module__
    return is_library and (_CPU.search(str(error)) or _OTHER.search(str(error))) is not None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and what it was raised from or while handling, outermost first."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames of a traceback, innermost first."""
    return reversed([frame for frame, _ in traceback.walk_tb(error.__traceback__)])  # pyright: ignore


def _module(frames: list[FrameType], model: nn.Module) -> str | None:
    """Return the name of the innermost module of ``model`` that was running."""
    names = {id(module): name for name, module in model.named_modules() if name}
    return next((names[id(own)] for frame in frames if id(own := frame.f_locals.get("self")) in names), None)


def _batch(batch: Batch) -> FailedBatch:
    num_rows, num_tokens = batch.input_ids.shape
    starts = [0, *(batch.position_ids == 0).flatten().nonzero().flatten().tolist()]
    starts = sorted(set(starts))  # a rank may have the rest of a row that others have the start of
    ends = [*starts[1:], batch.position_ids.numel()]
    return FailedBatch(
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_documents=len(starts),
        longest_document=max((end - start for start, end in zip(starts, ends, strict=True)), default=0),
        num_labelled=int((batch.shift_labels != IGNORED).sum()),
    )


def _asked_bytes(message: str) -> int | None:
    on_cpu = _CPU.search(message)
    return int(on_cpu[1]) if on_cpu else _size(_ASKED, message)


def _size(pattern: re.Pattern[str], message: str) -> int | None:
    found = pattern.search(message)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def _first_sentence(message: str) -> str:
    line = message.strip().split("\n", 1)[0]
    line = line.split("DefaultCPUAllocator: ", 1)[-1]
    return line.split(". ", 1)[0]
