"""Memory that runs out in the middle of a run: what is said of it, and what of the run is left."""

import gc
import json
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted_models import adapt, tokens
from small_runs import losses
from torch import nn

from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.data.batches import Batch
from sparse_llama.memory.checkpointing import checkpoint_layers
from sparse_llama.training import loop, saves
from sparse_llama.training.held import held_bytes, live_bytes
from sparse_llama.training.moment import Moment
from sparse_llama.training.out_of_memory import (
    REST,
    RunOutOfMemoryError,
    Shortage,
    describe,
    is_out_of_memory,
    release,
)

Train = Callable[..., Path]
TOO_MUCH = 2**50
"""Bytes that no machine has: the allocators refuse them everywhere."""
ON_CUDA = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 39.39 GiB of which 1.22 "
    "GiB is free. Including non-PyTorch memory, this process has 38.16 GiB memory in use. Of the allocated "
    "memory 36.75 GiB is allocated by PyTorch, and 924.50 MiB is reserved by PyTorch but unallocated."
)


def ask_for_too_much(*_: Any, **__: Any) -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def raised_by(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as found:  # noqa: PT011
        call()
    return found.value


def wrapped() -> None:
    try:
        ask_for_too_much()
    except RuntimeError as error:
        raise ValueError("could not go on") from error


@pytest.mark.parametrize(
    "call",
    [
        ask_for_too_much,
        lambda: np.empty(TOO_MUCH, dtype=np.uint8),
        lambda: bytearray(TOO_MUCH),
        lambda: mmap.mmap(-1, TOO_MUCH),
        lambda: torch.zeros(3).new_empty(TOO_MUCH),
        wrapped,
    ],
)
def test_memory_that_ran_out_is_recognised_whoever_says_so(call: Callable[[], Any]):
    assert is_out_of_memory(raised_by(call))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(ON_CUDA),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_the_errors_of_a_gpu_are_recognised(error: Exception):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("CUDA out of memory"),  # of something that is no library's
        OSError(28, "No space left on device"),
        KeyError("memory"),
    ],
)
def test_other_errors_are_not(error: Exception):
    assert not is_out_of_memory(error)


def describe_failure(model: nn.Module, call: Callable[[], Any]) -> Shortage:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    labels = torch.tensor([[-100, 5, -100, -100, 7, 7, 7, -100]] * 2)
    batch = Batch(torch.zeros(2, 8, dtype=torch.int64), positions, labels)
    moment = Moment("forward pass", step=3, batch=batch)
    error = raised_by(call)
    return describe(error, moment, model=model, engine=None, baseline_bytes=None, rank=0)


def test_the_module_the_batch_and_the_bytes_asked_for_are_named(tiny_llama):
    model = adapt(tiny_llama(), version="v1")
    model.get_submodule("model.layers.2.mlp.up_proj").register_forward_pre_hook(ask_for_too_much)
    found = describe_failure(model, lambda: model(input_ids=tokens()))
    assert found.asked_bytes == TOO_MUCH
    assert found.module == "model.layers.2.mlp.up_proj"
    assert found.place == "host"
    assert found.batch is not None
    assert (found.batch.num_rows, found.batch.num_tokens, found.batch.num_labelled) == (2, 8, 8)
    assert (found.batch.num_documents, found.batch.longest_document) == (4, 5)
    assert found.where == "forward pass of step 3, in model.layers.2.mlp.up_proj"


def test_the_module_is_named_where_a_checkpoint_computes_it_again(tiny_llama):
    """In the backward pass the traceback leads through autograd's engine; the frames below it are there."""
    model = adapt(tiny_llama(), version="v1").train()
    checkpoint_layers(model, ActivationCheckpointing(), first_layer=2)
    loss = model(input_ids=tokens()).logits.sum()
    model.get_submodule("model.layers.3.self_attn").register_forward_pre_hook(ask_for_too_much)
    found = describe_failure(model, loss.backward)
    assert found.module == "model.layers.3.self_attn"


def test_what_is_held_is_counted_by_component(tiny_llama):
    model = adapt(tiny_llama(), version="v2").train()
    model(input_ids=tokens()).logits.sum().backward()
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    frozen = sum(one.numel() for one in model.parameters() if not one.requires_grad)
    held = held_bytes(model, None, "cpu")
    assert held == {"weights": 4 * frozen, "adapters": 4 * trained, "gradients": 4 * trained} | {
        "optimizer": 0
    }
    assert set(held_bytes(model, None, "cuda").values()) == {0}
    found = describe_failure(model, ask_for_too_much)
    assert {name: found.held[name] for name in held} == held
    assert found.held[REST] > 0


def test_memory_that_two_share_is_counted_once(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True).requires_grad_(False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert held_bytes(model, None, "cpu")["weights"] == 4 * sum(one.numel() for one in model.parameters())


def test_tensors_that_nothing_of_the_run_knows_are_found():
    """Such as DeepSpeed's buffers; views and gradients are of memory that counts once, or for itself."""
    before = live_bytes()
    weight = torch.zeros(1000, requires_grad=True)
    weight.sum().backward()
    somewhere = {"deep": [(weight.detach().view(10, 100), torch.zeros(500, dtype=torch.bfloat16))]}
    assert live_bytes() - before == 2 * 4000 + 1000
    del somewhere, weight
    assert live_bytes() == before


def test_what_the_failed_frames_hold_is_let_go():
    """Otherwise there would be no room to save or to plan."""
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        large = torch.zeros(1000)
        kept.append(weakref.ref(large))
        ask_for_too_much()

    try:
        fail()
    except RuntimeError as error:
        assert kept[0]() is not None
        release(error)
    gc.collect()
    assert kept[0]() is None


class FailsAt:
    """Calls a function until its ``number``-th call, which asks for more memory than there is."""

    def __init__(self, call: Callable[..., Any], number: int) -> None:
        self.call, self.left = call, number

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            ask_for_too_much()
        return self.call(*args, **options)


def fail_in(phase: str, monkeypatch: pytest.MonkeyPatch, micro_step: int) -> None:
    """Run out of memory in the ``micro_step``-th micro-batch, two of which are a step."""
    if phase == "forward pass":
        from sparse_llama.model.objective import TokenLoss

        failing = FailsAt(TokenLoss.forward, micro_step)
        monkeypatch.setattr(TokenLoss, "forward", lambda self, **batch: failing(self, **batch))
    elif phase == "backward pass":
        from deepspeed.runtime.engine import DeepSpeedEngine

        failing = FailsAt(DeepSpeedEngine.backward, micro_step)
        monkeypatch.setattr(DeepSpeedEngine, "backward", lambda self, loss: failing(self, loss))
    else:
        failing = FailsAt(torch.optim.AdamW.step, micro_step // 2)
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: failing(self, *rest))


NO_LOOKS = {"sparse_llama": {"training": {"samples": 0}}}


@pytest.mark.parametrize(("phase", "stage"), [("forward pass", 0), ("backward pass", 2)])
def test_a_run_that_ran_out_of_memory_goes_on_as_if_it_had_not(
    train: Train, monkeypatch: pytest.MonkeyPatch, phase: str, stage: int
):
    """What was finished is saved although no checkpoint was due; the rest is that of an uninterrupted run, to
    the bit."""
    zero = {"zero_optimization": {"stage": stage}}
    whole = losses(train("whole", **NO_LOOKS, **zero))
    num_looks = 8 if phase == "forward pass" else 0  # the validation before goes through the loss, too
    with monkeypatch.context() as patch:
        fail_in(phase, patch, micro_step=num_looks + 2 * 3 + 2)
        with pytest.raises(RunOutOfMemoryError) as found:
            train("broken", **NO_LOOKS, **zero)
    shortage = found.value.shortage
    assert shortage.phase == phase
    step = shortage.step
    assert 1 < step < 6
    assert shortage.is_saved_now
    assert shortage.checkpoint is not None
    assert shortage.checkpoint.name == f"step_{step - 1:06d}"
    assert shortage.batch is not None
    assert (shortage.batch.num_rows, shortage.batch.num_tokens) == (2, 320)
    assert shortage.held["optimizer"] > 0
    resumed = train("broken", {"resume": "auto"}, **NO_LOOKS, **zero)
    assert losses(resumed) == whole


def test_an_update_that_stopped_half_way_is_not_saved(train: Train, monkeypatch: pytest.MonkeyPatch):
    """Some parameters have made the step and others have not."""
    saving = {"sparse_llama": {"training": {"samples": 0, "save_every": 1}}}
    with monkeypatch.context() as patch:
        fail_in("optimizer", patch, micro_step=2 * 3)
        with pytest.raises(RunOutOfMemoryError) as found:
            train("broken", **saving)
    shortage = found.value.shortage
    assert (shortage.phase, shortage.step, shortage.is_saved_now) == ("optimizer", 3, False)
    assert shortage.checkpoint is not None
    assert shortage.checkpoint.name == "step_000002"


def test_a_validation_that_runs_out_of_memory_loses_no_step(train: Train, monkeypatch: pytest.MonkeyPatch):
    looking = {"sparse_llama": {"training": {"samples": 0, "eval_every": 2}}}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", FailsAt(loop.validate, 2))
        with pytest.raises(RunOutOfMemoryError) as found:
            train("broken", **looking)
    shortage = found.value.shortage
    assert shortage.where == "validation after step 2"
    assert shortage.checkpoint is not None
    assert shortage.checkpoint.name == "step_000002"
    assert len(losses(train("broken", {"resume": "auto"}, **looking))) == 6


def test_a_checkpoint_that_does_not_fit_is_written_once_there_is_room(
    train: Train, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(saves, "save_checkpoint", FailsAt(saves.save_checkpoint, 1))
        with pytest.raises(RunOutOfMemoryError) as found:
            train("broken", sparse_llama={"training": {"samples": 0, "save_every": 2}})
    shortage = found.value.shortage
    assert shortage.where == "saving a checkpoint after step 2"
    assert shortage.is_saved_now
    assert shortage.checkpoint is not None
    assert shortage.checkpoint.name == "step_000002"


def test_a_model_that_cannot_be_loaded_names_no_other_runs_checkpoint(
    train: Train, monkeypatch: pytest.MonkeyPatch
):
    """The folder's run is replaced only once this one has begun: until then the checkpoints are the old
    one's."""
    old = train("run", **NO_LOOKS)
    with monkeypatch.context() as patch:
        patch.setattr("sparse_llama.model.assemble.attach_adapters", ask_for_too_much)
        with pytest.raises(RunOutOfMemoryError) as found:
            train("run", {"overwrite": True}, **NO_LOOKS)
    assert found.value.shortage.where == "loading the model"
    assert found.value.shortage.checkpoint is None
    assert json.loads((old / "summary.json").read_text(encoding="utf-8"))["steps"] == 6


def test_another_error_stays_what_it_is(train: Train, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(loop, "optimizer_step", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        train("broken", **NO_LOOKS)
