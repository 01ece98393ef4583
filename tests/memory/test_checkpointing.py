"""Checkpointed layers train the same, recompute what they say, and keep only their inputs."""

from typing import Any

import pytest
import torch
from adapted_models import adapt, tokens
from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import first_trained_layer, trainable_parameters
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.memory.checkpointing import checkpoint_layers, inputs_every, offload_engine
from sparse_llama.memory.nested import LayerInputs
from sparse_llama.memory.offload import HostOffload

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


@pytest.mark.parametrize("number_checkpoints", [None, 1])
@pytest.mark.parametrize("kind", ["on", "inputs on the CPU"])
def test_no_backward_pass_goes_below_the_first_adapter(tiny_llama, kind, number_checkpoints):
    """Memory trap 1: with checkpointing on, v1's layers 0 and 1 see no gradient, nor are they run again."""
    model = adapt(tiny_llama(), "v1", start_layer=2)
    settings = SETTINGS[kind].model_copy(update={"number_checkpoints": number_checkpoints})
    checkpoint_layers(model, settings, first_trained_layer(model))
    visited: list[int] = []
    run: list[int] = []
    is_needed: list[bool] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: is_needed.append(output.requires_grad)
    )
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_full_backward_hook(lambda *_, index=index: visited.append(index))
        layer.mlp.register_forward_hook(lambda *_, index=index: run.append(index))
    train(model)
    assert is_needed == [False]
    assert set(visited) == {2, 3}
    assert (run.count(0), run.count(1)) == (1, 1)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("variant", [{"start_layer": 2}, {"start_layer": None, "top_layers": 1}])
def test_layers_below_the_first_adapter_save_nothing(tiny_llama, variant, kind):
    """What a layer that runs forward only saved would be kept for a backward pass that never comes there."""
    model = adapt(tiny_llama(), "v1", **variant).train()
    first = first_trained_layer(model)
    checkpoint_layers(model, SETTINGS[kind], first)
    saved: list[tuple[int, int]] = []
    running: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: running.append(index))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append((running[-1] if running else -1, tensor.nbytes))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens(), use_cache=False).logits.sum()
    assert first == (2 if variant["start_layer"] == 2 else 3)
    assert saved
    assert min(index for index, _ in saved) >= first


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
    checkpoint_layers(model, SETTINGS["inputs on the CPU"], 0)
    engine = offload_engine(model)
    model.eval()
    with FlopCounterMode(display=False) as with_checkpoints, torch.no_grad():
        model(input_ids=tokens())
    model.train()
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    assert engine is not None
    assert engine.num_stored == 0
    checkpoint_layers(model, None, 0)
    assert offload_engine(model) is None
    with FlopCounterMode(display=False) as without, torch.no_grad():
        model(input_ids=tokens())
    assert with_checkpoints.get_total_flops() == without.get_total_flops()


def test_only_layer_inputs_go_to_the_host(tiny_llama, monkeypatch):
    """Memory traps 6 and 7: of v2 the lowest layer's input too, though nothing needs its gradient; and never
    a frozen weight, which would be copied on every step."""
    model = adapt(tiny_llama(), "v2")
    moved: list[torch.Tensor] = []
    store = HostOffload.store

    def record(self: HostOffload, tensor: torch.Tensor) -> Any:
        moved.append(tensor)
        return store(self, tensor)

    monkeypatch.setattr(HostOffload, "store", record)
    checkpoint_layers(model, SETTINGS["inputs on the CPU"], 0)
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    train(model)
    assert len(moved) == len(inputs) == 4
    assert all(one is other for one, other in zip(moved, inputs, strict=True))
    assert [tensor.requires_grad for tensor in moved] == [False, True, True, True]


def test_a_weight_as_a_layers_input_is_refused(tiny_llama):
    inputs = LayerInputs(1, HostOffload())
    with pytest.raises(AssertionError, match="frozen weight"):
        inputs.run(0, None, nn.Parameter(torch.ones(2)), is_own_checkpoint=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("start_layer", [0, 2])
def test_deepspeeds_own_offload_finds_the_layers(tiny_llama, start_layer):
    """Memory trap 19: it knows layers by a class of transformers; moved or renamed, the baseline of the
    benchmarks would measure nothing."""
    model = adapt(tiny_llama(), "v1", start_layer=start_layer)
    checkpoint_layers(model, SETTINGS["on"], first_trained_layer(model))
    baseline = CheckpointHiddenStatesOffload()
    with baseline:
        train(model)
        assert baseline.stats.marked_tensors == 4 - start_layer
        assert baseline.stats.skipped_marked_tensors == 4 - start_layer  # it moves nothing on a CPU


@pytest.mark.parametrize(
    ("num_layers", "number_checkpoints", "every"),
    [(32, None, 1), (32, 32, 1), (32, 16, 2), (30, 20, 2), (30, 16, 2), (30, 7, 5), (30, 1, 30), (30, 99, 1)],
)
def test_every_kth_input_is_kept(num_layers, number_checkpoints, every):
    """Never more than asked for, and by DeepSpeed's rule."""
    assert inputs_every(num_layers, number_checkpoints) == every
    if number_checkpoints is not None:
        assert -(-num_layers // every) <= number_checkpoints


def test_more_checkpoints_than_layers_are_said_to_have_no_effect(tiny_llama):
    model = adapt(tiny_llama(), "v1", start_layer=2)
    assert checkpoint_layers(model, ActivationCheckpointing(number_checkpoints=2), 2) == ()
    assert checkpoint_layers(model, ActivationCheckpointing(number_checkpoints=3), 2) == (
        "activation_checkpointing.number_checkpoints: no effect of 3; 2 layers train, and each keeps its "
        "input",
    )
