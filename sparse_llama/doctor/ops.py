"""DeepSpeed's ops: can those that runs load be compiled here, and are they?"""

import contextlib
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from sparse_llama.distributed.build_locks import find_locks
from sparse_llama.distributed.ops import exists_here, is_built, is_compatible, load_op
from sparse_llama.distributed.ranks import device
from sparse_llama.doctor.commands import ask, telling_line
from sparse_llama.doctor.findings import Finding, Status
from sparse_llama.errors import BuildError
from sparse_llama.reporting.tables import format_seconds

_ADVICE = {
    "async_io": "apt install libaio-dev, if you want that",
    "build": "install what the compiler misses; after another compiler, delete the op's folder of op builds",
}


@dataclass(frozen=True)
class Op:
    """An op, and who needs it."""

    name: str
    needed_by: str
    is_loaded: bool
    """Whether it is built and loaded here even where not every op is asked for."""
    if_impossible: Status = "warn"


def find_op(name: str) -> Op | None:
    """Return the op of a name, None where no run on this machine's device loads it."""
    return next((op for op in ops() if op.name == name), None)


def ops() -> list[Op]:
    """Return the ops of runs on this machine's device."""
    is_gpu = device().type == "cuda"
    own = Op("fused_adam", 'AdamW with "torch_adam": false', is_loaded=False)
    if not is_gpu:
        own = Op("deepspeed_shm_comm", "sums over ranks on CPUs", is_loaded=True)
    every = [
        own,
        Op("cpu_adam", "Adam and AdamW with --offload cpu", is_loaded=True),
        Op("async_io", "--offload nvme", is_loaded=True),
        Op("cpu_adagrad", "Adagrad with --offload cpu", is_loaded=False),
        Op("cpu_lion", "Lion with --offload cpu", is_loaded=False),
        Op("fused_lion", "Lion on a GPU", is_loaded=False),
    ]
    return every if is_gpu else [op for op in every if op.name != "fused_lion"]


def check_compilers() -> list[Finding]:
    """Return what ops are compiled with."""
    compiler = os.environ.get("CXX", "c++")
    found = ask(compiler, "--version")
    ninja = ask("ninja", "--version")
    return [
        _tool("C++ compiler", found, f"no {compiler}", "install g++ (apt install g++), or name one with CXX"),
        _tool("ninja", ninja, "not found", "pip install ninja"),
        *_nvcc(),
    ]


def _tool(name: str, found: str | None, missing: str, advice: str) -> Finding:
    if found is None:
        told = f"{missing}: ops that are not built yet cannot be"
        return Finding(name, "warn", told, advice)
    return Finding(name, "ok", found)


def _nvcc() -> list[Finding]:
    if device().type == "cpu":
        return []
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or ask(f"{CUDA_HOME}/bin/nvcc", "--version") is None:
        advice = "only ops need it: install the CUDA toolkit, and name its folder with CUDA_HOME"
        return [Finding("CUDA toolkit", "warn", "no nvcc: no op can be built", advice)]
    return [Finding("CUDA toolkit", "ok", CUDA_HOME)]


def check_locks() -> list[Finding]:
    """Return the builds that are locked, by a process or by none any more."""
    found: list[Finding] = []
    for lock in find_locks():
        name = f"{lock.op}'s lock"
        if lock.is_stale:
            told = f"{lock.path}: a build was killed under it; whoever waits for it waits for ever"
            found.append(Finding(name, "warn", told, f"runs remove it when they start; or: rm {lock.path}"))
        elif lock.holders:
            told = f"{lock.path}: being built by process {lock.holders[0]}"
            found.append(Finding(name, "warn", told, "wait for it"))
        else:
            told = f"{lock.path}: perhaps held by another host or container, or left by one"
            found.append(Finding(name, "warn", told, f"if nothing builds there: rm {lock.path}"))
    return found or [Finding("locks", "ok", "no build is under way, and none was killed")]


def check_op(op: Op, tell: Callable[[str], None], *, builds: bool, loads_all: bool) -> Finding:
    """Return whether an op can be built, and with ``builds`` whether it is.

    Args:
        tell: says something to who is waiting.
        loads_all: build and load what only a few runs need, too.
    """
    what_for = f"for {op.needed_by}: "
    if not exists_here(op.name):
        return Finding(op.name, "none", f"{what_for}DeepSpeed has none for this device")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        can_be_built = is_compatible(op.name)
    built = is_built(op.name)
    if not can_be_built and not built:
        reason = telling_line(said.getvalue()) if said.getvalue().strip() else "DeepSpeed does not say why"
        told = f"{what_for}cannot be built here ({reason.removeprefix('[WARNING]').strip(' .')})"
        return Finding(op.name, op.if_impossible, told, _ADVICE.get(op.name, "nothing, unless you want that"))
    if not builds or not (op.is_loaded or loads_all):
        return Finding(op.name, "none", f"{what_for}{'built' if built else 'not built yet, can be'}")
    if any(lock.op == op.name and not lock.is_stale for lock in find_locks()):
        # not to be waited for here: the row of the locks says it
        return Finding(op.name, "warn", f"{what_for}locked by a build", "look again when that is done")
    if not built:
        tell(f"compiling {op.name}, once for this machine: a minute or several ...")
    started = time.monotonic()
    try:
        load_op(op.name)
    except BuildError as error:
        reason = telling_line(str(error.__cause__ or error))
        return Finding(op.name, "fail", f"{what_for}does not build ({reason})", _ADVICE["build"])
    took_s = time.monotonic() - started
    how = "built and loads" if built else f"built in {format_seconds(took_s)}"
    return Finding(op.name, "ok", f"{what_for}{how}", varies=True)
