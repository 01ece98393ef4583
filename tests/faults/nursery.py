"""A process that has imported what takes 6 s, and starts runs of ``launch/train.py`` as its forks.

    python tests/faults/nursery.py

Each line on standard input is a ``Start`` as JSON, or the number of a process to wait for; each is answered
with a line: the process, or its exit status (negative: the signal that ended it).
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass
class Start:
    """One rank to start, and what is to happen to it."""

    words: list[str]
    """Of the command line."""
    log: str
    environment: dict[str, str] = field(default_factory=dict)
    kill_at_step: int | None = None
    """SIGKILL as the step's first forward pass begins."""
    kill_at_call: tuple[str, int] | None = None
    """SIGKILL before the n-th call of a function from the first save on, by the module that looks it up."""
    fail_at_call: tuple[str, int, int] | None = None
    """The n-th to m-th calls say that the drive is full."""
    max_file_bytes: int | None = None
    """What the system lets the process write into one file."""


class Nursery:
    """The process, seen from a test."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, start: Start) -> int:
        """Return the process that has been started."""
        return self._ask(json.dumps(asdict(start)))

    def wait(self, process: int) -> int:
        """Return the exit status of a process; negative is the signal that ended it."""
        return self._ask(str(process))

    def run(self, start: Start) -> int:
        return self.wait(self.start(start))

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _arm(start: Start) -> None:
    """Put the faults where they are to happen."""
    from sparse_llama.training import checkpoint, durable  # noqa: F401
    from sparse_llama.training.moment import FORWARD, SAVING, Moment

    saves = [0]
    enter = Moment.enter

    def entering(moment: Moment, phase: str, *arguments: Any) -> None:
        enter(moment, phase, *arguments)
        saves[0] += phase == SAVING
        if phase == FORWARD and moment.step == start.kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    Moment.enter = entering  # type: ignore[method-assign]
    for fault in (start.kill_at_call, start.fail_at_call):
        if fault is not None:
            _wrap(tuple(fault), saves)
    if start.max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (start.max_file_bytes, start.max_file_bytes))


def _wrap(fault: tuple[Any, ...], saves: list[int]) -> None:
    path, first, *last = fault
    place, _, name = path.rpartition(".")
    owner: Any = sys.modules.get(place) or getattr(
        sys.modules[place.rpartition(".")[0]], place.rpartition(".")[2]
    )
    original, calls = getattr(owner, name), [0]

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls[0] += saves[0] > 0
        if not last and calls[0] == first:
            os.kill(os.getpid(), signal.SIGKILL)
        if last and first <= calls[0] <= last[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def _child(start: Start) -> None:
    os.environ.update(start.environment)
    log = os.open(start.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 1
    try:
        _arm(start)
        from sparse_llama import cli

        sys.argv = ["launch/train.py", *start.words]
        cli.main(cli.train, cli.train_parser("train"), start.words)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    import deepspeed  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import sparse_llama.training.loop  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
            continue
        process = os.fork()
        if process == 0:
            _child(Start(**asked))
        print(process, flush=True)


def wait_for(is_so: Any, timeout_s: float = 60) -> bool:
    """Return whether ``is_so`` came to be true in time."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if is_so():
            return True
        time.sleep(0.005)
    return False


if __name__ == "__main__":
    main()
