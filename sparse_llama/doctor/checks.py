"""The checks there are, in their order. Nothing here imports what they check."""

from dataclasses import dataclass
from typing import Literal

Place = Literal["main", "host", "rank"]


@dataclass(frozen=True)
class Check:
    """One thing to look at, in a process that may hang or crash."""

    name: str
    """What is done, as one reads it while waiting; the worker knows it by this name."""
    section: str
    limit_s: float
    """After which it counts as hanging."""
    place: Place = "host"
    """Where a job of several ranks does it: on its main rank, on the first rank of each host, on every
    rank."""

    @property
    def row(self) -> str:
        """What a row is called that says only that it could not be done."""
        return self.name.removeprefix("op ").removeprefix("gradients: ")


SOFTWARE, DEVICES, MEMORY = "software", "devices", "memory and folders"
OPS, LAUNCHER, GRADIENTS = "DeepSpeed's ops", "launcher", "gradients, against the formulas in fp64"
SECTIONS = (SOFTWARE, DEVICES, MEMORY, OPS, LAUNCHER, GRADIENTS)
OP_NAMES = (
    *("deepspeed_shm_comm", "fused_adam", "cpu_adam", "async_io"),
    *("cpu_adagrad", "cpu_lion", "fused_lion"),
)
PATHS = (
    *("attention", "adapter v1", "adapter v2", "tiled loss", "tiled MLP and norms", "head groups"),
    *("checkpointing", "all of them, v1", "all of them, v2"),
)
_BUILD_LIMIT_S = 900.0
JOB = "a sum over the ranks of this job"


def checks(*, is_job: bool) -> list[Check]:
    """Return the checks of a machine, or of a job that the launcher has started on one or more.

    In a job its ranks meet early, when none has done more than another.
    """
    start = [
        Check("versions", SOFTWARE, 60),
        Check("imports", SOFTWARE, 180),
        Check("torch's CUDA", SOFTWARE, 60),
        Check("devices", DEVICES, 60, "rank"),
    ]
    memory = [Check("memory", MEMORY, 60)]
    ops = [
        Check("compilers", OPS, 60),
        Check("locks", OPS, 60),
        *(Check(f"op {name}", OPS, _BUILD_LIMIT_S) for name in OP_NAMES),
    ]
    gradients = [Check(f"gradients: {name}", GRADIENTS, 180, "rank") for name in PATHS]
    if is_job:
        return [*start, Check(JOB, LAUNCHER, 300, "rank"), *memory, *ops, *gradients]
    launcher = [
        Check(name, LAUNCHER, 240, "main") for name in ("deepspeed, 1 process", "deepspeed, 2 processes")
    ]
    return [*start, *memory, *ops, *launcher, *gradients]
