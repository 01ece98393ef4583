"""What is allocated, where and when, while code runs without data: a journal of allocations.

Every operation that a model, its autograd graph and its recomputation run passes a dispatch mode, which keys
results by their storage and notes when that appears and when it is released. Nothing has to be decided while
the journal is written: ``phases`` reads it.

Two ways to run without data. On ``meta``, which stands for the accelerator, tensors are plain meta tensors,
20 us an operation; those in host memory are fake CPU tensors, made here. A whole step under
``FakeTensorMode`` costs 150 us an operation, and at 262,144 tokens a layer in tiles has 10,000 of them. For a
run on the CPU, whose code asks whether it is on one, everything is a fake CPU tensor. (Fake CUDA tensors
abort a CPU build of PyTorch in their first autograd node.)

What a kernel takes and gives back inside one operation passes no dispatcher: it is declared
(``attention.workspace``), and in the journal for the moment of the call.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from sparse_llama.planning.operations import Operations

Place = Literal["gpu", "host", "disk"]
Workspaces = Mapping[Any, Callable[..., int]]
"""Bytes that an operation takes and gives back, as a function of its arguments."""
_GRANULE = 512  # what PyTorch's CUDA allocator rounds to and counts (``kMinBlockSize``)
BACKWARD = "backward"
"""The name of what a node of the graph makes, as which that node's is noted."""
_READ = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten.copy_.default
_COPIES = (_COPY, torch.ops.aten._to_copy.default)


class Kind(NamedTuple):
    """What a user is told of a tensor."""

    place: Place
    component: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    """Of its storage, as the allocator counts it."""


@dataclass(eq=False, slots=True)
class Allocation:
    """One storage, from the operation that made it to its release."""

    kind: Kind
    born: int
    died: int | None = None
    """Ticks of the journal; None is alive at its end."""


class Moment(NamedTuple):
    """The beginning of a phase of the step."""

    tick: int
    label: str
    layer: int | None


class Copied(NamedTuple):
    """A copy between places."""

    tick: int
    source: Place
    target: Place
    num_bytes: int


@dataclass
class Journal:
    """Allocations in order of birth, and the phases they fall in."""

    allocations: list[Allocation] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    copies: list[Copied] = field(default_factory=list)
    flops: list[tuple[int, int]] = field(default_factory=list)
    """(tick, floating-point operations) of every matrix product; attention's are not in it."""
    ticks: int = 0

    def tick(self) -> int:
        self.ticks += 1
        return self.ticks

    def begin(self, label: str, layer: int | None = None) -> None:
        """Begin a phase."""
        self.moments.append(Moment(self.tick(), label, layer))


class MemoryTracker(TorchDispatchMode):
    """Writes the journal of what runs under it.

    Args:
        places: of device types, as ``{"meta": "gpu", "cpu": "host"}``.
        workspaces: by operation.
        host: makes the host's tensors where the computation is on ``meta``; None is on top of a
            ``FakeTensorMode`` that is entered already.
    """

    def __init__(
        self, places: Mapping[str, Place], workspaces: Workspaces, host: FakeTensorMode | None
    ) -> None:
        super().__init__()
        self.journal = Journal()
        self.component, self.name = "other", ""
        """Of what is made next."""
        self._times = 1
        self._places, self._workspaces, self._host = places, workspaces, host
        self._live: dict[int, tuple[Allocation, Any]] = {}
        self._operations = Operations()
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        self._flops = {packet.default: flop_registry[packet] for packet in products}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and the wrapper costs as much as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self._run(func, args, kwargs)
        for value in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.note(value)
        workspace = self._workspaces.get(func)
        if workspace is not None:
            num_bytes = workspace(*args, **kwargs)
            if num_bytes:
                self._take_and_give_back(num_bytes, out, func)
        if func in self._flops:
            products = self._flops[func](*args, **kwargs, out_val=out)
            self.journal.flops.append((self.journal.ticks, self._times * products))
        elif func in _COPIES:
            self._note_copy(args[1] if func is _COPY else args[0], out)
        return out

    def note(self, tensor: torch.Tensor) -> Allocation:
        """Return the allocation that holds ``tensor``; a new one where its storage is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            return known[0]
        place, size = self._places[tensor.device.type], storage.nbytes()
        if place == "gpu":
            size = -(-size // _GRANULE) * _GRANULE
        component, name = self.component, self.name
        if component == "activations":
            if place == "host" and self._host is not None:
                component = "layer inputs"  # nothing else of a layer goes there
            elif name == BACKWARD:
                name = _current_node()
        kind = Kind(place, component, name, tuple(tensor.shape), tensor.dtype, size)
        allocation = Allocation(kind, self.journal.tick())
        self._live[key] = allocation, weakref.ref(storage, lambda _: self._release(key))
        self.journal.allocations.append(allocation)
        return allocation

    def relabel(self, tensor: torch.Tensor, component: str, name: str) -> None:
        """Say what a tensor turned out to be."""
        allocation = self.note(tensor)
        allocation.kind = allocation.kind._replace(component=component, name=name)

    @contextmanager
    def labelled(self, component: str, name: str = "") -> Iterator[None]:
        """Label what is made inside."""
        before = self.component, self.name
        self.component, self.name = component, name
        try:
            yield
        finally:
            self.component, self.name = before

    @contextmanager
    def standing_for(self, count: int) -> Iterator[None]:
        """Count what is computed and copied inside ``count`` times: it stands for as many tiles."""
        before = self._times
        self._times = before * count
        try:
            yield
        finally:
            self._times = before

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._host is None:
            return func(*args, **kwargs)
        if func is _READ and args[0].dtype == torch.bool:
            # transformers asks whether rows are packed: no mask comes of it either way
            return False
        device = kwargs.get("device")
        if (device is None or torch.device(device).type != "cpu") and not _is_on_host(args):
            return self._operations.run(func, args, kwargs)
        if func is _COPY:
            return args[0]
        with self._host:
            out = func(*args, **kwargs)
        if isinstance(out, FakeTensor) and out.device.type == "meta":
            return torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
        return out

    def _release(self, key: int) -> None:
        allocation, _ = self._live.pop(key)
        allocation.died = self.journal.tick()

    def _take_and_give_back(self, num_bytes: int, out: Any, func: Any) -> None:
        first = next(value for value in tree_iter(out) if isinstance(value, torch.Tensor))
        name = func._opname.lstrip("_")
        kind = Kind(self._places[first.device.type], "workspaces", name, (num_bytes,), torch.uint8, num_bytes)
        self.journal.allocations.append(Allocation(kind, self.journal.tick(), self.journal.tick()))

    def _note_copy(self, source: torch.Tensor, result: torch.Tensor) -> None:
        if source.device.type != result.device.type:
            places = self._places[source.device.type], self._places[result.device.type]
            self.journal.copies.append(Copied(self.journal.ticks, *places, self._times * result.nbytes))


def _current_node() -> str:
    node = torch._C._current_autograd_node()
    return BACKWARD if node is None else f"{BACKWARD}: {node.name().removesuffix('Backward')}"


def _is_on_host(values: Any) -> bool:
    for value in values:
        if type(value) is FakeTensor or (type(value) in (list, tuple) and _is_on_host(value)):
            return True
    return False
