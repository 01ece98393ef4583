"""Every k-th layer's input is kept, and the layers train as if nothing was thrown away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapted_models import adapt, shifted, tokens
from live_storages import LiveStorages
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import first_trained_layer, trainable_parameters
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.config.settings import MemorySettings
from sparse_llama.memory.checkpointing import checkpoint_layers, offload_engine
from sparse_llama.memory.head_groups import group_heads

NUM_LAYERS, FIRST = 7, 2
PLACES = ("device", "host", "drive")
BATCHES = [tokens(num_tokens=9), tokens(num_tokens=12).flip(0)]
INPUT_BYTES = 2 * 9 * 32 * 8  # (B, T, C) of the first batch, in fp64


@pytest.fixture
def make(tiny_llama: Callable[..., Any], tmp_path: Path) -> Callable[..., LlamaForCausalLM]:
    """Return a function that makes an adapted fp64 model whose layers keep ``number_checkpoints`` inputs."""

    def build(
        version: str,
        number_checkpoints: int | None = None,
        place: str | None = None,
        groups: int | None = None,
    ) -> LlamaForCausalLM:
        model = adapt(tiny_llama(num_hidden_layers=NUM_LAYERS).double(), version, start_layer=FIRST).train()
        group_heads(model, MemorySettings(head_groups=groups))
        if place is not None:
            settings = ActivationCheckpointing(
                cpu_checkpointing=place != "device", number_checkpoints=number_checkpoints
            )
            drive = str(tmp_path) if place == "drive" else None
            checkpoint_layers(model, settings, first_trained_layer(model), nvme_path=drive)
        return model

    return build


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross entropy over two documents in each row."""
    positions = torch.cat([torch.arange(4), torch.arange(ids.shape[1] - 4)]).expand_as(ids)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), shifted(ids).flatten(), ignore_index=-100, reduction="sum")


def train(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """Return the losses of two micro-batches, whose gradients add up."""
    losses = []
    for ids in BATCHES:
        losses.append(loss_of(model, ids))
        losses[-1].backward()
    return [loss.detach() for loss in losses]


def assert_same(model: LlamaForCausalLM, losses: list[torch.Tensor], other: LlamaForCausalLM) -> None:
    expected = dict(trainable_parameters(other))
    torch.testing.assert_close(losses, train(other), rtol=1e-10, atol=1e-10)
    for name, parameter in trainable_parameters(model):
        assert parameter.grad is not None, name
        assert expected[name].grad.norm() > 0, name  # type: ignore[union-attr]
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_losses_and_gradients_are_those_of_the_plain_run(make, version, place, every):
    """Groups that do not divide the layers (5 train of v1, 7 of v2), packed rows, grouped-query attention,
    two micro-batches of unequal length."""
    num_trained = NUM_LAYERS - (FIRST if version == "v1" else 0)
    model = make(version, -(-num_trained // every), place)
    assert_same(model, train(model), make(version))
    engine = offload_engine(model)
    if engine is not None:
        assert engine.num_stored == 2 * -(-num_trained // every)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number_checkpoints", [None, 2])
def test_layers_of_head_groups_keep_their_input_the_same_way(make, version, place, number_checkpoints):
    """They are checkpoints by themselves: only their input is saved, and that goes where it is sent."""
    model = make(version, number_checkpoints, place, groups=2)
    assert_same(model, train(model), make(version, groups=2))
    engine = offload_engine(model)
    num_trained = NUM_LAYERS - (FIRST if version == "v1" else 0)
    if engine is not None:
        assert engine.num_stored == 2 * (number_checkpoints or num_trained)


def test_a_layer_of_head_groups_is_not_run_once_more(make):
    """torch's checkpoint around it would: a forward pass for nothing."""

    def flops(place: str | None) -> int:
        model = make("v2", None, place, groups=2)
        with FlopCounterMode(display=False) as counter:
            loss_of(model, BATCHES[0]).backward()
        return counter.get_total_flops()

    assert flops("host") == flops(None)


@pytest.mark.parametrize("number_checkpoints", [7, 4, 3, 2, 1])
def test_only_every_kth_input_exists_after_the_forward_pass(make, number_checkpoints):
    """Counted by the storages that exist: with the inputs, the last layer's output, which the norm keeps."""
    model = make("v2", number_checkpoints, "device")
    with LiveStorages(INPUT_BYTES) as alive:
        loss = loss_of(model, BATCHES[0])
        assert alive.count == number_checkpoints + 1
        loss.backward()
        assert alive.count == 0


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_group_has_k_minus_1_inputs_beside_the_layer_at_hand(make, every):
    """And one layer's activations, as with a checkpoint on every layer: not those of k."""
    num_kept = -(-NUM_LAYERS // every)
    peaks = []
    for number_checkpoints in (NUM_LAYERS, num_kept):
        model = make("v2", number_checkpoints, "device")
        with LiveStorages(INPUT_BYTES) as alive:
            loss = loss_of(model, BATCHES[0])
            alive.peak = 0
            loss.backward()
        peaks.append(alive.peak - number_checkpoints)
    last_group = NUM_LAYERS - (num_kept - 1) * every
    # the last group is the fullest moment: every other kept input is still there
    assert peaks[1] - peaks[0] <= max(last_group - 1, every - 2)
    assert peaks[1] - peaks[0] >= last_group - 1


@pytest.mark.parametrize("every", [2, 3, 7])
def test_a_group_costs_the_forward_pass_of_its_layers_but_the_last(make, every):
    """(k - 1) / k of a forward pass, in FLOPs."""
    num_kept = -(-NUM_LAYERS // every)

    def flops(number_checkpoints: int | None) -> int:
        model = make("v2", number_checkpoints, "device")
        with FlopCounterMode(display=False) as counter:
            loss_of(model, BATCHES[0]).backward()
        return counter.get_total_flops()

    model = make("v2")
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        loss_of(model, BATCHES[0])
    counts = counter.get_flop_counts()
    of_layers = [sum(counts[f"LlamaForCausalLM.model.layers.{i}"].values()) for i in range(NUM_LAYERS)]
    again = [i for i in range(NUM_LAYERS - 1) if (i + 1) % every != 0]
    assert len(again) == NUM_LAYERS - num_kept
    assert flops(num_kept) - flops(None) == sum(of_layers[i] for i in again)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("groups", [None, 2])
def test_a_graph_can_be_used_twice_and_thrown_away(make, place, groups):
    """Nothing is lost after the first backward pass, and nothing waits for one that never comes."""
    model, plain = make("v2", 3, place, groups), make("v2", groups=groups)
    loss_of(model, BATCHES[0])
    for one in (model, plain):
        loss = loss_of(one, BATCHES[1])
        loss.backward(retain_graph=True)
        loss.backward()
    expected = dict(trainable_parameters(plain))
    for name, parameter in trainable_parameters(model):
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-10, atol=1e-10)
    engine = offload_engine(model)
    if engine is not None:
        assert engine.host_bytes + engine.drive_bytes == 3 * INPUT_BYTES * 12 // 9  # 3 of 12 tokens


@pytest.mark.parametrize("place", PLACES)
def test_two_forward_passes_before_their_backward_passes(make, place):
    model, plain = make("v1", 2, place), make("v1")
    for one in (model, plain):
        first, second = (loss_of(one, ids) for ids in BATCHES)
        first.backward()
        second.backward()
    expected = dict(trainable_parameters(plain))
    for name, parameter in trainable_parameters(model):
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-10, atol=1e-10)
