"""Locks on the builds of DeepSpeed's ops, of which a killed process leaves one that nobody ever takes away.

DeepSpeed compiles an op at its first use on a machine, in a folder under a file called ``lock`` (torch 2.13,
``torch/utils/file_baton.py``). Whoever finds the lock waits until it is gone, with no limit, and the file
outlives a process that Linux kills: from then on every start hangs, without a word. Here such a lock is told
from one that is in use, and taken away.

Who builds has the lock open, and ninja, which may go on building after the process that started it was
killed, works in the folder. Both can be looked up for the processes of this machine, and only there: a lock
on a network drive, or in a folder that a container shares, may be another machine's or container's. That one
stays, unless it is older than any build takes, and whoever needs the op is told after a limited wait.
"""

import fcntl
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_llama.errors import BuildError

SHARED_MEMORY_OP = "deepspeed_shm_comm"
"""What DeepSpeed loads when ranks on CPUs join a process group."""
WAIT_S = 1200.0
"""For a build that is under way. The longest takes a minute or two, and six were seen on a busy core."""
LONGEST_BUILD_S = 3600.0
_LOCK = "lock"
_POLL_S = 0.2
_QUIET_S = 10.0  # of a wait, until it is said
_LOCAL_FILESYSTEMS = (
    *("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs"),
    *("overlay", "ramfs", "reiserfs", "tmpfs", "xfs", "zfs"),
)
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of Linux: that of the host itself
_PROC = Path("/proc")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildLock:
    """A lock on the build of an op."""

    path: Path
    holders: tuple[int, ...]
    """Processes of this machine that build under it, as far as can be seen."""
    is_stale: bool
    """Whether it is certain that nobody builds under it."""

    @property
    def op(self) -> str:
        """The op's name, ``cpu_adam``."""
        return self.path.parent.name


def builds_folder() -> Path:
    """Return the folder that torch builds extensions in, for this Python and this torch."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named is not None:
        return Path(named)
    from torch.utils.cpp_extension import get_default_build_root  # 0.2 s

    hip, cuda = torch.version.hip, torch.version.cuda
    accelerator = f"rocm{hip}" if hip is not None else "cpu" if cuda is None else f"cu{cuda}"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(get_default_build_root(), f"{python}_{accelerator.replace('.', '')}")


def find_locks() -> list[BuildLock]:
    """Return the locks of all builds, held or left, by name."""
    found = (_look_at(path) for path in sorted(builds_folder().glob(f"*/{_LOCK}")))
    return [lock for lock in found if lock is not None]


def clear_stale_locks(ops: Iterable[str] | None = None) -> list[BuildLock]:
    """Remove the locks that killed builds have left; return them.

    Nothing is removed on another system than Linux, nor in a job of several hosts, where one may build for
    all.

    Args:
        ops: of these ops only; None is of all.
    """
    if not _is_one_host():
        return []
    names = None if ops is None else set(ops)
    stale = [lock for lock in find_locks() if lock.is_stale and (names is None or lock.op in names)]
    return [lock for lock in stale if _take_away(lock.path)]


def wait_for_builds(ops: Iterable[str], *, limit_s: float = WAIT_S) -> None:
    """Return when no build of ``ops`` is locked, so that loading them waits for nobody; every rank calls it.

    The first rank of the host removes what killed builds have left, and says so once.

    Raises:
        BuildError: a lock is still there after ``limit_s``.
    """
    names, deadline = tuple(ops), time.monotonic() + limit_s
    says_at = time.monotonic() + _QUIET_S
    clears = os.environ.get("LOCAL_RANK", "0") == "0"
    waiting = [builds_folder() / name / _LOCK for name in names] if names else []
    while waiting := [path for path in waiting if path.exists()]:
        removed = clear_stale_locks(names) if clears else []
        for lock in removed:
            logger.warning(
                "note: %s: removed; a build of DeepSpeed's %s was killed under it", lock.path, lock.op
            )
        if removed:
            continue
        if time.monotonic() > deadline:
            raise BuildError(_say(waiting[0], limit_s))
        if clears and time.monotonic() > says_at:
            says_at = math.inf
            logger.warning("note: %s: a build of DeepSpeed's that is waited for", waiting[0])
        time.sleep(_POLL_S)


def _take_away(path: Path) -> bool:
    """Remove a lock that is stale, and say whether it was still there to be removed.

    While this process has the folder locked, no other one removes the file, and so none can begin a build
    between the look and the removal.
    """
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        lock = _look_at(path)
        if lock is None or not lock.is_stale:
            return False
        path.unlink()
    except OSError:  # another user's folder: whoever waits for the build is told of the file
        return False
    finally:
        os.close(folder)
    return True


def _say(path: Path, limit_s: float) -> str:
    lock = _look_at(path)
    holders = () if lock is None else lock.holders
    who = f"by process {holders[0]}" if holders else "by no process that can be seen from here"
    return (
        f"{path}: DeepSpeed's {path.parent.name} has been locked for {limit_s:.0f} s by a build, held {who}; "
        "if nothing builds it any more, here or on another host or container with this folder, delete the "
        "file and start again"
    )


def _look_at(path: Path) -> BuildLock | None:
    """Return what is known of a lock; None where it has gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    if sys.platform != "linux":
        return BuildLock(path, (), is_stale=False)
    holders, is_certain = _find_holders(path, status)
    if not holders and not (is_certain and _is_seen_whole(path)):
        is_certain = time.time() - status.st_mtime > LONGEST_BUILD_S
        return BuildLock(path, (), is_stale=is_certain)
    return BuildLock(path, holders, is_stale=not holders)


def _find_holders(path: Path, status: os.stat_result) -> tuple[tuple[int, ...], bool]:
    """Return the processes that build under a lock, and whether all that could were looked at.

    Of this user's own processes Linux hides those that have privileges which this one has not, such as the
    first one of a virtual machine: none that trains. Of another user's, who made the lock, it may hide all.
    """
    holders: list[int] = []
    is_own, is_certain = status.st_uid == os.geteuid(), True
    for process in _PROC.iterdir():
        if not process.name.isdecimal():
            continue
        try:
            if any(_leads_to(link, path, status) for link in _open_files(process)):
                holders.append(int(process.name))
        except PermissionError:
            is_certain = is_certain and (is_own or not _belongs_to(process, status.st_uid))
        except OSError:  # it has ended meanwhile
            continue
    return tuple(sorted(holders)), is_certain


def _open_files(process: Path) -> Iterator[Path]:
    yield process / "cwd"
    yield from (process / "fd").iterdir()


def _leads_to(link: Path, path: Path, status: os.stat_result) -> bool:
    """Return whether an open file is the lock, or a working folder the lock's.

    By name first: asking for the status of whatever a process has open may hang with a drive that does.
    """
    wanted = path.parent if link.name == "cwd" else path
    try:
        if Path(os.readlink(link)).name != wanted.name:
            return False
        return os.path.samestat(link.stat(), wanted.stat() if link.name == "cwd" else status)
    except FileNotFoundError:  # closed meanwhile
        return False


def _belongs_to(process: Path, user: int) -> bool:
    try:
        return process.stat().st_uid == user
    except OSError:
        return False


def _is_seen_whole(path: Path) -> bool:
    """Return whether every process that can reach ``path`` is one of those in /proc: a drive of this machine
    and, from within a container, one of the container's own."""
    if _filesystem(path) not in _LOCAL_FILESYSTEMS:
        return False
    try:
        if os.readlink(_PROC / "self/ns/pid") == _FIRST_PID_NAMESPACE:
            return True
        return path.stat().st_dev == Path("/").stat().st_dev
    except OSError:
        return False


def _filesystem(path: Path) -> str | None:
    """Return the type of the file system that ``path`` is on, as /proc/self/mountinfo has it."""
    found, depth = None, -1
    try:
        resolved = path.resolve()
        lines = (_PROC / "self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mount = Path(fields.split()[4].encode().decode("unicode_escape"))  # a space is \040
        if resolved.is_relative_to(mount) and len(mount.parts) >= depth:  # a later mount covers an earlier
            found, depth = rest.split()[0], len(mount.parts)
    return found


def _is_one_host() -> bool:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))  # torchrun's, DeepSpeed's
    return int(local) == world_size
