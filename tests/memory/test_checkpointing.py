"""Checkpointed layers train the same, recompute what they say, and keep only their inputs."""

from typing import Any

import pytest
import torch
from adapted_models import adapt, tokens
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import first_trained_layer, trainable_parameters
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.memory import checkpointing
from sparse_llama.memory.checkpointing import checkpoint_layers

SETTINGS = {
    "off": None,
    "on": ActivationCheckpointing(),
    "inputs on the CPU": ActivationCheckpointing(cpu_checkpointing=True),
}


def train(model: LlamaForCausalLM) -> torch.Tensor:
    model.train()
    loss = model(input_ids=tokens(), use_cache=False).logits.log_softmax(-1)[..., 0].sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["on", "inputs on the CPU"])
def test_gradients_are_those_without_checkpointing(tiny_llama, version, kind):
    """T23, memory trap 2: the reentrant checkpoint behind a frozen embedding gives 3 gradients of 73, without
    an error."""
    plain, checkpointed = (adapt(tiny_llama(), version) for _ in range(2))
    checkpoint_layers(checkpointed, SETTINGS[kind], first_trained_layer(checkpointed))
    assert torch.equal(train(plain), train(checkpointed))
    expected = dict(trainable_parameters(plain))
    for name, parameter in trainable_parameters(checkpointed):
        assert parameter.grad is not None, name
        assert expected[name].grad.norm() > 0, name  # type: ignore[union-attr]
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-6, atol=1e-6)


def test_no_backward_pass_goes_below_the_first_adapter(tiny_llama):
    """Memory trap 1: with checkpointing on, v1's layers 0 and 1 see no gradient."""
    model = adapt(tiny_llama(), "v1", start_layer=2)
    checkpoint_layers(model, SETTINGS["on"], first_trained_layer(model))
    visited: list[int] = []
    is_needed: list[bool] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: is_needed.append(output.requires_grad)
    )
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_full_backward_hook(lambda *_, index=index: visited.append(index))
    train(model)
    assert is_needed == [False]
    assert set(visited) == {2, 3}


def step_flops(tiny_llama: Any, version: str, kind: str) -> int:
    model = adapt(tiny_llama(), version, start_layer=2)
    checkpoint_layers(model, SETTINGS[kind], first_trained_layer(model))
    with FlopCounterMode(display=False) as counter:
        train(model)
    return counter.get_total_flops()


@pytest.mark.parametrize(("version", "num_recomputed"), [("v1", 2), ("v2", 4)])
def test_exactly_the_trained_layers_are_recomputed(tiny_llama, version, num_recomputed):
    """In FLOPs: each recomputed layer costs its forward again, but for a last product whose output nothing
    needs."""
    extra = step_flops(tiny_llama, version, "on") - step_flops(tiny_llama, version, "off")
    model = adapt(tiny_llama(), version, start_layer=2)
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    counts = counter.get_flop_counts()
    of_layers = [sum(counts[f"LlamaForCausalLM.model.layers.{index}"].values()) for index in range(4)]
    of_down_proj = [
        sum(counts[f"LlamaForCausalLM.model.layers.{index}.mlp.down_proj"].values()) for index in range(4)
    ]
    expected = sum(of_layers[-num_recomputed:])
    assert expected - sum(of_down_proj[-num_recomputed:]) <= extra <= expected


def test_checkpointing_is_off_in_evaluation(tiny_llama):
    model = adapt(tiny_llama(), "v2")
    checkpoint_layers(model, SETTINGS["on"], 0)
    model.eval()
    with FlopCounterMode(display=False) as with_checkpoints, torch.no_grad():
        model(input_ids=tokens())
    checkpoint_layers(model, None, 0)
    with FlopCounterMode(display=False) as without, torch.no_grad():
        model(input_ids=tokens())
    assert with_checkpoints.get_total_flops() == without.get_total_flops()


def test_only_layer_inputs_go_to_the_cpu(tiny_llama, monkeypatch):
    """Memory trap 7: ``save_on_cpu`` around a layer that is not checkpointed would copy its frozen
    weights."""
    model = adapt(tiny_llama(), "v2")
    moved: list[torch.Tensor] = []

    class Recorder(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            assert not pin_memory

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                moved.append(tensor)
                return tensor

            super().__init__(pack, lambda tensor: tensor)

    monkeypatch.setattr(checkpointing, "save_on_cpu", Recorder)
    checkpoint_layers(model, SETTINGS["inputs on the CPU"], 0)
    train(model)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not any(tensor.untyped_storage().data_ptr() in parameters for tensor in moved if tensor.numel())
    assert [tuple(tensor.shape) for tensor in moved if tensor.numel()] == [(2, 9, 32)] * 4


def test_a_weight_as_a_layers_input_is_refused():
    with pytest.raises(AssertionError, match="frozen weight"):
        checkpointing._recompute_from_cpu(lambda x: x, nn.Parameter(torch.ones(2)))
