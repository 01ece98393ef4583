"""A decoder layer as one autograd function that keeps its input and works on a group of heads at a time.

A checkpointed layer still has 13 (B, T, C) tensors alive at the peak of its backward pass, 26 GiB at 7B and
262,144 tokens in bf16. Here it has 4 + 8/c with c groups of heads; ``head_groups_backward`` lists them. The
price over a checkpointed layer is the projections to q, k and v once more, and the products of those linear
layers whose scales train.

Layouts, prompts, scales and norms are the plain layer's, and so are the numbers, but for the order of sums:
over groups, and over tiles of tokens. It replaces transformers' layer's forward and not its weights.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sparse_llama.adapters.linear_parts import computing_dtype
from sparse_llama.attention.interface import attention_core
from sparse_llama.config.settings import MemorySettings
from sparse_llama.memory.head_groups_backward import attention_backward, mlp_backward
from sparse_llama.memory.head_groups_call import LayerCall, LayerParts, make_groups
from sparse_llama.memory.head_groups_forward import attend, forward_pass
from sparse_llama.memory.head_groups_parts import GradientSums
from sparse_llama.memory.ownership import References, count_references, is_alone, references_when_alone

DEFAULT_TILE = 4096
"""Tokens of a tile where ``mlp_tile`` names none.

At 7B in bf16 a token of a tile holds about 170 KB: the MLP's width, 11,008, seven to eight times over. 4,096
tokens are 0.7 GB, less than the 8/c tensors of the third pass from 22,000 tokens x c on, and matrix products
of 4,096 rows run at full speed.
"""


class HeadGroupLayer(LlamaDecoderLayer):
    """A LlamaDecoderLayer over another one's own modules; names in a state dict do not change."""

    keeps_only_input = True
    """Nothing but the layer's input is saved for the backward pass, so that a checkpoint around it would only
    run it once more; what moves saved tensors elsewhere may be put around it."""

    def __init__(self, base: LlamaDecoderLayer, num_groups: int, tile: int) -> None:
        nn.Module.__init__(self)  # the base class' own would allocate the weights again
        self.hidden_size = base.hidden_size
        self.self_attn, self.mlp = base.self_attn, base.mlp
        self.input_layernorm = base.input_layernorm
        self.post_attention_layernorm = base.post_attention_layernorm
        self.groups = make_groups(base.self_attn.config, num_groups)
        self.tile = tile
        self._alone = references_when_alone()
        self.train(base.training)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the layer's modules, which ZeRO-3 has to gather around the layer.

        As a "leaf" (``set_z3_leaf_modules``) it would be gathered too, but its gradients reduced by a hook on
        the module that, where the input needs no gradient, runs before they are made (DeepSpeed 0.19.8,
        ``stage3.py``, ``reduce_leaf_module_grads``): v2's lowest layer would train on zeros, without an
        error.
        """
        return list(self.parameters())

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the (B, T, C) output. With a cache (generation), or a mixture of adapters, the computation
        is transformers' own."""
        attention: Any = self.self_attn
        prompted = getattr(attention, "zero_init", None)
        if cache is not None or (prompted is not None and prompted.segments):
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,  # type: ignore[arg-type]
                cache=cache,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        assert position_embeddings is not None
        assert computing_dtype(hidden_states, hidden_states) == hidden_states.dtype, (
            "under autocast; head groups compute in the model's own type"
        )

        def core_of(query: torch.Tensor, key: torch.Tensor, heads: range) -> Any:
            return attention_core(attention, query, key, position_ids, attention.scaling, heads=heads)

        call = LayerCall(LayerParts.of(self), self.groups, self.tile, *position_embeddings, core_of)
        trained = call.parts.trained()
        assert len(trained) == sum(parameter.requires_grad for parameter in self.parameters()), (
            "a parameter of the base trains, whose gradient a layer of head groups does not make"
        )
        return _GroupedLayer.apply(hidden_states, call, self._alone, *trained)  # type: ignore[return-value]


def group_heads(model: LlamaForCausalLM, settings: MemorySettings) -> None:
    """Make every decoder layer of ``model`` work on one of ``head_groups`` groups of heads at a time, in
    tiles of ``mlp_tile`` tokens.

    Layers below the first that trains save nothing, but their forward pass is as small.

    Raises:
        ConfigError: the heads cannot be grouped so.
    """
    num_groups = settings.num_head_groups
    if num_groups is None:
        return
    layers: Any = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = HeadGroupLayer(layer, num_groups, settings.mlp_tile or DEFAULT_TILE)


class _GroupedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, call: LayerCall, alone: References, *trained: torch.Tensor
    ) -> torch.Tensor:
        ctx.call, ctx.alone, ctx.trained = call, alone, trained
        # The input alone goes through autograd's hands, and so through the hooks of who moves it to the host.
        ctx.save_for_backward(hidden)
        return forward_pass(hidden, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        references = count_references(grad)
        if not is_alone(references, ctx.alone, grad):
            grad = grad.clone(memory_format=torch.contiguous_format)
        (hidden,) = ctx.saved_tensors
        call, needs_hidden = ctx.call, ctx.needs_input_grad[0]
        sums, prompt = GradientSums(ctx.trained), call.prompt_heads()
        products, attended = attend(hidden, call, prompt, keeps_outputs=True)
        grad_heads = mlp_backward(hidden, grad, products, call, sums)
        del products
        attention_backward(hidden, grad, grad_heads, attended, call, prompt, sums, needs_hidden=needs_hidden)
        grads = (sums.of(parameter) for parameter in ctx.trained)
        return grad if needs_hidden else None, None, None, *grads
