"""Who this process is among the launcher's processes, and the few collectives that the project needs.

The launcher (``deepspeed``, ``torchrun``) sets ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``. Without it a
command runs as the only process of a job of one, on a port that the kernel picks.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from sparse_llama.distributed.build_locks import SHARED_MEMORY_OP, wait_for_builds

Item = TypeVar("Item")

_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
_JOB += ("MASTER_ADDR", "MASTER_PORT")  # variables of launchers, and ours


def rank() -> int:
    """Return this process' number among all; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process' number on its host; it names the GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process is the one that prints and writes."""
    return rank() == 0


def device() -> torch.device:
    """Return the device this process computes on: its own GPU, or the CPU."""
    use_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return torch.device("cuda", local_rank()) if use_cuda else torch.device("cpu")


def initialize() -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs); does nothing the second time.

    Raises:
        BuildError: the build of what ranks on CPUs talk through is locked for good.
    """
    if dist.is_initialized():
        return
    if device().type == "cpu":
        # DeepSpeed picks its accelerator from the first library it finds; the devices must agree with ours.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _share_cores()
    else:
        torch.cuda.set_device(device())
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    if device().type == "cpu":
        wait_for_builds([SHARED_MEMORY_OP])
    import deepspeed  # takes 2 s: only when a process group is needed

    deepspeed.init_distributed(verbose=False)
    if device().type == "cpu":
        _unlink_shared_buffer()


def finalize() -> None:
    """Leave the process group, so that no rank warns about a leaked one at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here; returns at once without a process group."""
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process through the block before all others, which then find what it has left on disk.

    A mistake of the main one lets the others go on, to find it for themselves.
    """
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``tensor`` over all processes, as a new tensor; the tensor itself with one
    process."""
    if not dist.is_initialized() or world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def own_share(items: list[Item]) -> list[Item]:
    """Return every n-th of ``items``, so that n processes do each once; all without a process group."""
    if not dist.is_initialized():
        return items
    return items[rank() :: world_size()]


def broadcast_from_main(tensor: torch.Tensor) -> torch.Tensor:
    """Return the main process' ``tensor`` on every process; the tensor itself with one process."""
    if not dist.is_initialized() or world_size() == 1:
        return tensor
    same = tensor.clone()
    dist.broadcast(same, src=0)
    return same


def from_main(number: int) -> int:
    """Return the main process' ``number`` on every process."""
    return int(broadcast_from_main(torch.tensor(number, dtype=torch.int64, device=device())))


def gather_numbers(number: float) -> list[float]:
    """Return every process' ``number``, in fp64, by rank."""
    numbers = torch.zeros(world_size(), dtype=torch.float64, device=device())
    numbers[rank()] = number
    return all_reduce_sum(numbers).tolist()


def environment_without_job() -> dict[str, str]:
    """Return this process' environment without what makes it a part of its job: that of one which starts a
    job of its own."""
    return {name: value for name, value in os.environ.items() if name not in _JOB}


def _unlink_shared_buffer() -> None:
    """Take the name off DeepSpeed's shared memory, so that it goes when its processes do.

    DeepSpeed 0.19.8 (``csrc/cpu/comm/shm.cpp``, ``shm_initialize``) leaves 66 MiB of memory for every process
    of every job that was ever run on a machine, and a later job on the same port would open them as its own.
    """
    if world_size() > 1:
        dist.barrier()  # every process has opened the others' by name
    variables = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    name = "_".join(("deepspeed_allreduce_buffer", str(os.getuid()), *variables, str(rank())))
    Path("/dev/shm", name).unlink(missing_ok=True)


def _share_cores() -> None:
    """Give every process of this host its share of the cores, unless the user has set the threads.

    Two processes of two threads each on two cores are ten times slower than two of one: each waits in a spin
    loop for threads that are not running.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_local))


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
