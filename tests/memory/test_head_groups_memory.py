"""What a layer of head groups keeps, holds at its peak, and writes into."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted_models import adapt, tokens
from allocated import peak_bytes
from grouped_models import (
    Make,
    assert_equal_gradients,
    gradients,
    grouped_model,
    plain_model,
    with_wide_norms,
)
from saved_tensors import kept_for_backward
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.attach import attach_adapters, first_trained_layer, trainable_parameters
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.config.settings import AdapterSettings, MemorySettings
from sparse_llama.memory.checkpointing import checkpoint_layers
from sparse_llama.memory.head_groups import group_heads

EXACT = 1e-10
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def loss_of(model: LlamaForCausalLM) -> torch.Tensor:
    return model(input_ids=tokens(), use_cache=False).logits.log_softmax(-1)[..., 0].sum()


@pytest.mark.parametrize(("version", "first"), [("v1", 2), ("v2", 0)])
def test_a_layer_keeps_its_input_and_nothing_else(tiny_llama, version, first):
    """The layers below the first that trains keep nothing, as their inputs need no gradient."""
    model = grouped_model(tiny_llama, version, 2)
    hidden = torch.randn(2, 9, 32, dtype=torch.float64)
    rope = model.model.rotary_emb(hidden, torch.arange(9)[None])

    def run() -> torch.Tensor:
        output = hidden
        for layer in model.model.layers:
            output = layer(output, position_embeddings=rope)
        return output

    kept = kept_for_backward(run, model)
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 9, 32)] * (4 - first)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_parameter_gets_one_gradient_a_backward_pass(tiny_llama, version):
    """Memory trap 14: ZeRO reduces whenever a gradient arrives, and would reduce parts of one."""
    model, arrived = grouped_model(tiny_llama, version, 4, tile=2), []
    for name, parameter in trainable_parameters(model):
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    loss_of(model).backward()
    assert sorted(arrived) == sorted(name for name, _ in trainable_parameters(model))


def test_no_backward_pass_goes_below_the_first_adapter(tiny_llama):
    model, visited = grouped_model(tiny_llama, "v1", 2), []
    for index, layer in enumerate(model.model.layers):
        layer.register_full_backward_hook(lambda *_, index=index: visited.append(index))
    with pytest.warns(UserWarning, match="no inputs require gradients"):  # of layer 2, the lowest
        loss_of(model).backward()
    assert set(visited) == {2, 3}


CHECKPOINTS = {
    "inputs on the device": ActivationCheckpointing(),
    "inputs on the host": ActivationCheckpointing(cpu_checkpointing=True),
    "every second on the host": ActivationCheckpointing(cpu_checkpointing=True, number_checkpoints=2),
}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointing_moves_the_input_and_changes_no_gradient(tiny_llama, version, kind):
    expected = gradients(plain_model(tiny_llama, version), tokens())
    model = grouped_model(tiny_llama, version, 2)
    checkpoint_layers(model, CHECKPOINTS[kind], first_trained_layer(model))
    assert_equal_gradients(gradients(model, tokens()), expected, EXACT)


def test_a_checkpoint_computes_nothing_again(tiny_llama):
    """The layer is its own checkpoint; another around it would only cost a forward pass."""
    counts = []
    for settings in (None, ActivationCheckpointing(), ActivationCheckpointing(cpu_checkpointing=True)):
        model = grouped_model(tiny_llama, "v2", 2)
        checkpoint_layers(model, settings, 0)
        with FlopCounterMode(display=False) as counter:
            loss_of(model).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2]


def test_the_price_is_the_projections_once_more_and_the_products_that_scales_need(tiny_llama):
    """In FLOPs of matrix products. Over a checkpointed layer of v1: q, k and v once more. Of v2 over v1: the
    products of q, k, v and down_proj that their scales need; those of o, gate and up are at hand."""
    model: Any = tiny_llama()
    config, num_tokens, prompt_length = model.config, 8, 3
    key_value = 2 * config.hidden_size * config.head_dim * 2 * config.num_key_value_heads
    qkv = key_value + 2 * config.hidden_size * config.head_dim * config.num_attention_heads
    down = 2 * config.intermediate_size * config.hidden_size

    def count(version: str, groups: int | None) -> int:
        model = adapt(tiny_llama(num_hidden_layers=2), version, start_layer=1).train()
        if groups is None:
            checkpoint_layers(model, ActivationCheckpointing(), 1)
        else:
            group_heads(model, MemorySettings(head_groups=groups))
        hidden = torch.randn(1, num_tokens, config.hidden_size, requires_grad=True)
        rope = model.model.rotary_emb(hidden, torch.arange(num_tokens)[None])
        with FlopCounterMode(display=False) as counter:
            model.model.layers[1](hidden, position_embeddings=rope).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        return sum(number for op, number in counts.items() if op in PRODUCTS)

    v1, v2 = count("v1", 2), count("v2", 2)
    assert v1 - count("v1", None) == num_tokens * qkv
    assert v2 - v1 == num_tokens * (qkv + down) + prompt_length * key_value


class Consumer(torch.autograd.Function):
    """A node below which a gradient is exclusively the layer's, or is not."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, given: list[torch.Tensor], keeps: bool) -> torch.Tensor:
        ctx.given, ctx.keeps = given, keeps
        return tensor.sum()

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return (ctx.given[0] if ctx.keeps else ctx.given.pop()), None, None


def one_layer(make: Make, groups: int | None = 2) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    model = adapt(make(num_hidden_layers=1), "v2", start_layer=0).train()
    if groups is not None:
        group_heads(model, MemorySettings(head_groups=groups, mlp_tile=4))
    with_wide_norms(model.double())
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).double()
    rope = model.model.rotary_emb(hidden, torch.arange(9)[None])
    return model.model.layers[0], hidden, {"position_embeddings": rope}


def test_a_gradient_that_nobody_else_has_is_written_into(tiny_llama):
    """Else the layer would hold a fifth tensor of token by width: this is what 4 + 8/c counts on."""
    layer, hidden, inputs = one_layer(tiny_llama)
    grad = torch.ones(2, 9, 32, dtype=torch.float64)
    address, given = grad.data_ptr(), [grad]
    del grad
    hidden.requires_grad_()
    Consumer.apply(layer(hidden, **inputs), given, False).backward()
    assert hidden.grad is not None
    assert hidden.grad.data_ptr() == address


SHARED: dict[str, Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]] = {
    "kept by the node above": lambda output, held: Consumer.apply(output, held, True),
    "seen through a view": lambda output, held: Consumer.apply(
        output.view(-1, 32), [held[0].view(-1, 32)], False
    ),
    "expanded": lambda output, held: output.sum(),
}


@pytest.mark.parametrize("how", SHARED)
def test_a_gradient_that_others_have_is_left_as_it_is(tiny_llama, how):
    """Memory trap 13."""
    layer, hidden, inputs = one_layer(tiny_llama)
    held = [torch.ones(2, 9, 32, dtype=torch.float64)]
    hidden.requires_grad_()
    SHARED[how](layer(hidden, **inputs), held).backward()
    assert torch.equal(held[0], torch.ones_like(held[0]))
    plain, leaf, inputs = one_layer(tiny_llama, None)
    leaf.requires_grad_()
    plain(leaf, **inputs).sum().backward()
    torch.testing.assert_close(hidden.grad, leaf.grad, rtol=1e-9, atol=1e-9)


def test_layers_that_share_a_gradient_and_whoever_captures_it_see_it_whole(tiny_llama):
    """A sum passes one tensor to both of its terms; ``autograd.grad`` and hooks keep what passes by."""
    found, seen = [], []
    for groups in (2, None):
        layer, hidden, inputs = one_layer(tiny_llama, groups)
        twin = copy.deepcopy(layer)
        hidden.requires_grad_()
        one, other = layer(hidden, **inputs), twin(hidden, **inputs)
        own: list[torch.Tensor] = []
        one.register_hook(own.append)
        other.retain_grad()
        total = (one + other) * 2
        found.append(torch.autograd.grad(total.square().sum(), (one, hidden), retain_graph=True))
        total.square().sum().backward()
        assert other.grad is not None
        seen.append((*own, other.grad))
    for ours, theirs in zip((*found[0], *seen[0]), (*found[1], *seen[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("version", "groups", "most_forward", "most_backward"), [("v2", 4, 3.2, 6.2), ("v1", 8, 2.7, 5.4)]
)
def test_the_peak_is_four_tensors_and_eight_over_the_groups(version, groups, most_forward, most_backward):
    """In tensors of token by width, by the allocator's own events, at LLaMA-7B's proportions: 4 + 8/c in the
    backward pass and 2 + 4/c in the forward pass, and a little for a tile of a 32nd of the tokens."""
    num_tokens, width = 4096, 512
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=1376,
        num_hidden_layers=1,
        num_attention_heads=8,
        max_position_embeddings=num_tokens,
    )
    model = LlamaForCausalLM(config)
    attach_adapters(model, AdapterSettings(version=version, start_layer=0))
    group_heads(model, MemorySettings(head_groups=groups, mlp_tile=128))
    hidden = torch.randn(1, num_tokens, width, requires_grad=True)
    rope = model.model.rotary_emb(hidden, torch.arange(num_tokens)[None])
    outputs: list[torch.Tensor] = []
    layer = model.train().model.layers[0]
    forward = peak_bytes(lambda: outputs.append(layer(hidden, position_embeddings=rope)))
    loss = Consumer.apply(outputs.pop(), [torch.randn_like(hidden)], False)
    backward = peak_bytes(loss.backward)
    # the input was there before, and in the backward pass the incoming gradient
    assert 1 + forward / hidden.nbytes <= most_forward
    assert 2 + backward / hidden.nbytes <= most_backward


def test_a_step_needs_shapes_and_no_data(tiny_llama):
    """The planner runs it under fake tensors; the gradient that nobody else has is known there too."""
    layer, _, _ = one_layer(tiny_llama)
    parameters = [one for one in layer.parameters() if one.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(2, 9, 32, dtype=torch.float64, requires_grad=True)
        rope = tuple(torch.empty(1, 9, 10, dtype=torch.float64) for _ in range(2))
        given = [torch.empty(2, 9, 32, dtype=torch.float64)]
        storage = given[0].untyped_storage()._cdata
        loss = Consumer.apply(layer(hidden, position_embeddings=rope), given, False)
        grad, *grads = torch.autograd.grad(loss, [hidden, *parameters])
    assert grad.untyped_storage()._cdata == storage
    assert [one.shape for one in grads] == [one.shape for one in parameters]
