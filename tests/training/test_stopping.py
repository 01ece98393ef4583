"""A run that is stopped before its end saves every finished step, and goes on from there to the bit."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_runs import losses

from sparse_llama import cli
from sparse_llama.distributed import ranks
from sparse_llama.errors import ConfigError, RankLostError, StoppedError
from sparse_llama.training import stopping
from sparse_llama.training.checkpoint import list_checkpoints
from sparse_llama.training.moment import BACKWARD, FORWARD, SAVING, UPDATE, VALIDATION, Moment
from sparse_llama.training.stopping import Interrupted, Stopping, words_of_lost_rank

Train = Callable[..., Path]
PLAIN: dict[str, Any] = {"sparse_llama": {"training": {"samples": 0}}}


def send_at(patch: pytest.MonkeyPatch, phase: str, step: int, number: int) -> None:
    """Have this process get a signal once it has entered a phase of a step."""
    enter = Moment.enter

    def sending(moment: Moment, entered: str, *arguments: Any) -> None:
        enter(moment, entered, *arguments)
        if (entered, moment.step) == (phase, step):
            patch.undo()
            os.kill(os.getpid(), number)

    patch.setattr(Moment, "enter", sending)


@pytest.mark.parametrize(
    ("phase", "step", "number", "saved"),
    [
        (FORWARD, 4, signal.SIGTERM, 3),
        pytest.param(BACKWARD, 4, signal.SIGINT, 3, marks=pytest.mark.faults),
        (UPDATE, 4, signal.SIGUSR1, 4),
        pytest.param(VALIDATION, 6, signal.SIGTERM, 6, marks=pytest.mark.faults),
    ],
)
def test_a_signal_saves_the_finished_steps_and_the_run_goes_on_to_the_bit(
    train: Train,
    plain_run: Train,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    phase: str,
    step: int,
    number: signal.Signals,
    saved: int,
):
    """A forward or backward pass is broken off, which may take minutes; an update is not."""
    handlers = [signal.getsignal(one) for one in stopping.SIGNALS]
    with monkeypatch.context() as patch:
        send_at(patch, phase, step, number)
        with pytest.raises(
            StoppedError, match=rf"{number.name}: after step {saved}, .*step_00000{saved} is saved"
        ):
            train("run", **PLAIN)
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == handlers
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        f"step_00000{saved}"
    ]
    whole, rest = plain_run(**PLAIN), train("run", flags={"resume": "auto"}, **PLAIN)
    assert losses(rest) == losses(whole)
    tensors, again = (load_file(run / "adapter" / "adapter.safetensors") for run in (whole, rest))
    assert all(tensors[name].equal(again[name]) for name in tensors)


def test_before_the_first_step_there_is_nothing_to_save(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with monkeypatch.context() as patch:
        send_at(patch, VALIDATION, 0, signal.SIGTERM)
        with pytest.raises(StoppedError, match="SIGTERM: before the first step, there is nothing to save"):
            train("run", **PLAIN)
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


def test_the_time_budget_ends_a_run_in_time_and_each_start_has_it_anew(
    train: Train, plain_run: Train, monkeypatch: pytest.MonkeyPatch
):
    """A clock of the test's own, by which every step takes 10 s."""
    now_s = [0.0]
    monkeypatch.setattr(stopping, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now_s[0])}))
    enter = Moment.enter

    def timed(moment: Moment, phase: str, *arguments: Any) -> None:
        now_s[0] += 5.0 if phase == FORWARD else 0.0  # two micro-batches a step
        enter(moment, phase, *arguments)

    monkeypatch.setattr(Moment, "enter", timed)
    monkeypatch.setattr(stopping.Stopping, "__enter__", _started_at(now_s))
    flags: dict[str, Any] = {"time_budget_s": 35.0}
    with pytest.raises(StoppedError, match=r"time_budget_s \(35 s\): after step 3, .*step_000003 is saved"):
        train("run", flags=flags, **PLAIN)
    rest = train("run", flags=flags | {"resume": "auto"}, **PLAIN)
    assert losses(rest) == losses(plain_run(**PLAIN))


def _started_at(now_s: list[float]) -> Callable[[Stopping], Stopping]:
    def begin(own: Stopping) -> Stopping:
        own._started_s = own._turn_s = now_s[0]
        return own

    return begin


def test_a_budget_that_is_over_before_the_first_step_is_a_mistake(train: Train):
    """Started again and again, such a run would never get further."""
    with pytest.raises(ConfigError, match=r"time_budget_s: 0\.001 s are over before the first step"):
        train("run", flags={"time_budget_s": 0.001}, **PLAIN)


def test_ranks_of_a_job_finish_the_step_and_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A rank that broke off by itself would leave the others waiting for it."""
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    heard: list[float] = []

    def gather(number: float) -> list[float]:
        heard.append(number)
        return [0.0, float(signal.SIGTERM)]  # the other rank's

    monkeypatch.setattr(ranks, "gather_numbers", gather)
    moment = Moment(FORWARD, step=7)
    with Stopping(moment, budget_s=None, started_s=time.monotonic()) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert "SIGUSR1: saving the finished steps once step 7 is done" in capsys.readouterr().err
        assert stop.reason() == "SIGTERM"
    assert heard == [float(signal.SIGUSR1)]


def test_a_second_ctrl_c_stops_at_once_and_the_launchers_sigterm_does_not():
    """The launcher turns a Ctrl-C into SIGTERM: a run that took that for impatience would never save."""
    with Stopping(Moment(SAVING), budget_s=None, started_s=0.0):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Stopping(Moment(FORWARD), budget_s=None, started_s=0.0), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_a_stopped_run_says_is_no_error_and_has_a_status_of_its_own(capsys: pytest.CaptureFixture[str]):
    """Scripts tell "go on" from "give up" by it."""

    def stop(_: object) -> None:
        raise StoppedError("SIGTERM: after step 3, run/checkpoints/step_000003 is saved; --resume goes on")

    with pytest.raises(SystemExit) as ended:
        cli.main(stop, cli.train_parser("doc"), [])
    assert ended.value.code == 4
    assert capsys.readouterr().err.startswith("stopped: SIGTERM: after step 3")


def test_a_lost_rank_is_told_from_other_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2231"
    assert words_of_lost_rank(RuntimeError(words)) is None, "one process has no others"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert words_of_lost_rank(RuntimeError(words)) == words
    assert words_of_lost_rank(RuntimeError("shapes do not match")) is None

    def lose(_: object) -> None:
        raise RankLostError("another rank has ended")

    started_s = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        cli.main(lose, cli.train_parser("doc"), [])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: rank 1: another rank has ended\n"
    assert time.monotonic() - started_s < 5, "the main rank may be the one that has ended"
