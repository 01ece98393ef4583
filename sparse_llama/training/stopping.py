"""Stopping before the end: a signal (Ctrl-C, a scheduler, a spot machine that is taken back) or the run's
time budget; either way the finished steps are saved.

A job of one process breaks off whatever it is doing, except for an update or a save. Ranks of a larger job
must stop after the same step, so they agree at the end of each.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

from sparse_llama.distributed import ranks
from sparse_llama.errors import ConfigError, RankLostError
from sparse_llama.training.moment import BACKWARD, FORWARD, VALIDATION, Moment

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm is asked for in ``#SBATCH --signal=B:USR1@120``."""
_BREAKABLE = (FORWARD, BACKWARD, VALIDATION)
_TIME_IS_OVER = -1
_MARGIN = 1.2  # of the longest step so far: the next may take longer


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""What gloo's errors have in them; they are RuntimeErrors like any other."""
_SHOWN = 160


class Interrupted(BaseException):
    """Raised in the middle of a step or a validation; no library takes it for an error of its own."""


class Stopping:
    """Whether a run is to stop, and why; as a context it listens to signals.

    Args:
        budget_s: seconds from ``started_s`` (of ``time.monotonic``) by which the run must have ended; None is
            no limit.
    """

    def __init__(self, moment: Moment, *, budget_s: float | None, started_s: float) -> None:
        self._moment, self._budget_s, self._started_s = moment, budget_s, started_s
        self._longest_s = 0.0
        self._turn_s = time.monotonic()
        self._is_first = True
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Callable[..., object] | int | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self) -> str | None:
        """Return why the run is to stop before the next step, the same on every rank; None where it goes on.
        Every rank must call it, before each step.

        Raises:
            ConfigError: the time budget is over before the first step: a run that goes on with ``--resume``
                would never get further.
        """
        # from step to step, with what was saved and validated between; at first, the validation before
        now_s, is_first = time.monotonic(), self._is_first
        self._longest_s = max(self._longest_s, now_s - self._turn_s)
        self._turn_s, self._is_first = now_s, False
        word = 0 if self._received is None else int(self._received)
        if not word and self._budget_s is not None and ranks.is_main():
            left_s = self._budget_s - (now_s - self._started_s)
            word = _TIME_IS_OVER if left_s <= _MARGIN * self._longest_s else 0
        word = self._agreed(word)
        if word == _TIME_IS_OVER and is_first:
            raise ConfigError(
                f"sparse_llama.training.time_budget_s: {self._budget_s:g} s are over before the first step, "
                f"which began after {now_s - self._started_s:.0f} s; give the run more"
            )
        return self._name(word)

    def _agreed(self, word: int) -> int:
        if ranks.world_size() == 1:
            return word
        return next((int(one) for one in ranks.gather_numbers(word) if one), 0)

    def _name(self, word: int) -> str | None:
        if word == 0:
            return None
        return signal.Signals(word).name if word > 0 else f"time_budget_s ({self._budget_s:g} s)"

    @property
    def received(self) -> str:
        """The name of the signal that this process has got."""
        assert self._received is not None
        return self._received.name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            # The launcher turns Ctrl-C into SIGTERM, so that both come: only a second Ctrl-C is the user's.
            if number == signal.SIGINT and self._received == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._received = signal.Signals(number)
        can_break_off = ranks.world_size() == 1 and self._moment.phase in _BREAKABLE
        if ranks.is_main():
            when = "" if can_break_off else f" once step {self._moment.step} is done"
            again = "; again to stop at once" if number == signal.SIGINT else ""
            print(f"\n{self.received}: saving the finished steps{when}{again}", file=sys.stderr, flush=True)
        if can_break_off:
            raise Interrupted


def words_of_lost_rank(error: BaseException) -> str | None:
    """Return what a collective has said of another rank that has ended; None where ``error`` is about
    something else."""
    if not isinstance(error, RuntimeError) or ranks.world_size() == 1:
        return None
    text = " ".join(str(error).split())
    is_one = isinstance(error, dist.DistBackendError) or any(word in text for word in _LOST)
    return f"{text[:_SHOWN]}..." if is_one and len(text) > _SHOWN else text if is_one else None


def lost_rank(words: str, newest: Path | None) -> RankLostError:
    """Return the error of a rank that goes on without another, which has said ``words`` by its absence."""
    then = (
        f"the newest checkpoint is {newest}, --resume goes on from it" if newest else "no checkpoint is there"
    )
    return RankLostError(
        f'another rank has ended ("{words}"): its own message is above, or the system ended it, for want of '
        f"host memory for one; {then}"
    )
