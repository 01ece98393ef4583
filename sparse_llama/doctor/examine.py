"""Checks done in a process of their own, so that one that hangs or crashes is a finding like any other."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparse_llama.doctor.checks import OPS, Check
from sparse_llama.doctor.commands import last_line
from sparse_llama.doctor.findings import Finding
from sparse_llama.doctor.processes import end_session

_MODULE = "sparse_llama.doctor.worker"
_START_S = 120.0
"""For a process to start and to import torch and DeepSpeed, on top of its first check's limit."""
_LAST_S = 5.0  # from a process' last word to its end
_ROOT = Path(__file__).parents[2]


def examine(
    checks: Sequence[Check],
    options: dict[str, bool],
    *,
    began: Callable[[Check], None],
    noted: Callable[[str], None],
    environment: dict[str, str] | None = None,
    module: str = _MODULE,
) -> Iterator[tuple[Check, list[Finding]]]:
    """Yield what each check has found, in order. None can hang, and none can end this process.

    Args:
        options: of the checks.
        began: is called when a check begins.
        noted: is called with what a check has to say meanwhile.
        environment: of the process that looks, beside this one's.
        module: that is run for it.
    """
    remaining = list(checks)
    while remaining:
        names = [check.name for check in remaining]
        with _Worker(module, options, names, environment or {}) as worker:
            extra_s = _START_S
            while remaining:
                check = remaining.pop(0)
                began(check)
                findings, goes_on = _wait(worker, check, check.limit_s + extra_s, noted)
                yield check, findings
                if not goes_on:
                    break
                extra_s = 0.0


def _wait(
    worker: "_Worker", check: Check, limit_s: float, noted: Callable[[str], None]
) -> tuple[list[Finding], bool]:
    """Return the findings of a check, and whether its process goes on to the next."""
    deadline = time.monotonic() + limit_s
    while True:
        message = worker.read(deadline - time.monotonic())
        if message is None:
            is_over = time.monotonic() >= deadline
            status, said = worker.end(waits_s=0.0 if is_over else _LAST_S)
            if check.section == OPS:
                _clear_own_lock(check)
            return [_hung(check, said) if is_over else _crashed(check, status, said)], False
        if "note" in message:
            noted(message["note"])
        if "findings" in message:
            findings = [Finding(**one) for one in message["findings"]]
            return findings, not message["is_last"]


def _hung(check: Check, said: str) -> Finding:
    told = f"no answer within {check.limit_s:.0f} s; last words: {last_line(said)}"
    return Finding(check.row, "fail", told, "a run would hang here too; report this with the text below")


def _crashed(check: Check, status: int, said: str) -> Finding:
    ended = f"its process ended with status {status}"
    if status < 0:
        with suppress(ValueError):
            ended = f"its process was ended by {signal.Signals(-status).name}"
    told = f"{ended}; last words: {last_line(said)}"
    return Finding(check.row, "fail", told, "a run would end so too; report this with the text below")


def _clear_own_lock(check: Check) -> None:
    """Take away the lock of a build that has just been killed."""
    from sparse_llama.distributed.build_locks import clear_stale_locks  # torch: 2 s, in this case only

    clear_stale_locks([check.row])


class _Worker:
    """A process that looks, with a session of its own, and the pipe that it tells through."""

    def __init__(
        self, module: str, options: dict[str, bool], names: list[str], environment: dict[str, str]
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._channel, writing = os.pipe()
        paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(one for one in paths if one)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(writing), json.dumps(options), *names],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        os.close(self._channel)
        self._log.close()

    def read(self, limit_s: float) -> dict[str, Any] | None:
        """Return its next message; None where it has ended, or said nothing for ``limit_s``."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._channel], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(self._channel, 65536) if ready else b""
            if not more:
                return None
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def end(self, *, waits_s: float = 0.0) -> tuple[int, str]:
        """End it with all that it has started; return its status and what was printed.

        Args:
            waits_s: for it to end by itself before.
        """
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(waits_s)
        end_session(self._process.pid)
        status = self._process.wait()
        self._log.seek(0)
        return status, self._log.read().decode("utf-8", errors="replace")
