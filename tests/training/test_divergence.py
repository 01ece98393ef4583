"""A loss that is no number, or worse than guessing, ends a run with the last good checkpoint and the batch
that did it."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import losses
from training.test_stopping import send_at

from sparse_llama.errors import DivergedError, StoppedError
from sparse_llama.model.objective import TokenLoss
from sparse_llama.training.checkpoint import list_checkpoints
from sparse_llama.training.divergence import RECORD
from sparse_llama.training.moment import FORWARD

Train = Callable[..., Path]
SAVING: dict[str, Any] = {"training": {"samples": 0, "save_every": 1, "keep_last": 9, "steps": 8}}


def spoil(patch: pytest.MonkeyPatch, factor: float, calls: set[int]) -> None:
    """Multiply the loss of some of the training's micro-batches, counted from 1."""
    forward, count = TokenLoss.forward, [0]

    def spoiled(own: TokenLoss, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = forward(own, *arguments, **options)
        if not torch.is_grad_enabled():
            return loss  # a validation
        count[0] += 1
        return loss * factor if count[0] in calls else loss

    patch.setattr(TokenLoss, "forward", spoiled)


def names(output_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(output_dir / "checkpoints")]


def test_a_nan_ends_the_run_and_names_the_last_good_checkpoint_and_the_batch(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The second micro-batch of step 4; from its update on the adapter is NaN, and stays it."""
    with monkeypatch.context() as patch:
        spoil(patch, math.nan, {2 * 3 + 2})
        with pytest.raises(DivergedError) as found:
            train("run", sparse_llama=SAVING)
    said = str(found.value)
    assert (
        "diverged for 3 steps in a row: the loss is nan, from step 4 on, worst in micro-batch 2 (row" in said
    )
    assert f"go on from {tmp_path / 'run' / 'checkpoints' / 'step_000003'} with --resume" in said
    assert names(tmp_path / "run") == ["step_000001", "step_000002", "step_000003"]
    record = json.loads((tmp_path / "run" / RECORD).read_text(encoding="utf-8"))
    assert (record["step"], record["micro_batch"], record["rank"]) == (4, 2, 0)
    assert [text for text in record["documents"] if "### Instruction:" in text], "the texts themselves"
    assert len(record["rows"]) == 2
    whole = train("run", flags={"resume": "auto"}, sparse_llama=SAVING)  # the fault does not come again
    assert len(losses(whole)) == 8
    assert not [loss for loss in losses(whole) if not math.isfinite(loss)]


def test_a_loss_worse_than_guessing_is_borne_for_so_many_steps(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Two bad steps of three allowed: the run goes on, and has saved nothing meanwhile."""
    with monkeypatch.context() as patch:
        spoil(patch, 50.0, {5, 6, 7, 8})  # steps 3 and 4
        train("run", sparse_llama=SAVING)
    assert names(tmp_path / "run") == [f"step_00000{step}" for step in (1, 2, 5, 6, 7, 8)]
    patient = {"training": SAVING["training"] | {"diverged_patience": 2}}
    with monkeypatch.context() as patch:
        spoil(patch, 50.0, {5, 6, 7, 8})
        with pytest.raises(
            DivergedError, match=r"for 2 steps in a row: the loss is \d+\.\d+, worse than guessing"
        ):
            train("other", sparse_llama=patient)


@pytest.mark.faults
def test_a_run_that_ends_badly_is_not_saved_whatever_the_patience(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with monkeypatch.context() as patch:
        spoil(patch, math.inf, {2 * 8})
        with pytest.raises(DivergedError, match=r"for 1 step in a row: the loss is inf, from step 8 on"):
            train("run", sparse_llama=SAVING)
    assert names(tmp_path / "run")[-1] == "step_000007"
    assert not (tmp_path / "run" / "adapter").exists()


class _NoNumber(torch.autograd.Function):
    """Passes a loss on, and a gradient that is no number back."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * math.nan


def spoil_gradient(patch: pytest.MonkeyPatch, call: int) -> None:
    forward, count = TokenLoss.forward, [0]

    def spoiled(own: TokenLoss, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = forward(own, *arguments, **options)
        count[0] += torch.is_grad_enabled()
        return _NoNumber.apply(loss) if torch.is_grad_enabled() and count[0] == call else loss

    patch.setattr(TokenLoss, "forward", spoiled)


def test_a_gradient_that_is_no_number_is_noticed_where_the_loss_is_one(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The step's loss is fine, its update is not: a checkpoint after it would hold NaN."""
    with monkeypatch.context() as patch:
        spoil_gradient(patch, 5)
        with pytest.raises(DivergedError, match="the gradient is no number, from step 3 on"):
            train("run", sparse_llama=SAVING)
    assert names(tmp_path / "run")[-1] == "step_000002"


@pytest.mark.faults
def test_where_deepspeed_leaves_such_an_update_out_the_run_goes_on(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The ZeRO stages do."""
    with monkeypatch.context() as patch:
        spoil_gradient(patch, 5)
        run = train("run", flags={"zero_stage": 2}, sparse_llama=SAVING)
    assert "step_000003" not in names(run)
    tensors = load_file(run / "adapter" / "adapter.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.faults
def test_a_run_that_is_stopped_while_it_diverges_saves_nothing_of_that(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with monkeypatch.context() as patch:
        spoil(patch, math.nan, {2 * 3 + 1})
        send_at(patch, FORWARD, 5, signal.SIGTERM)
        with pytest.raises(
            StoppedError, match=r"after step 4, which is not saved.*step_000003 is from before"
        ):
            train("run", sparse_llama=SAVING)
    assert names(tmp_path / "run")[-1] == "step_000003"
