"""A LLaMA with its adapter merged: what of it folds into plain weights, what does not, and all its tensors.

Scales and biases fold (``adapters/merge.py``), norms are copied. Plain LLaMA has a bias on all projections of
its attention, or of its MLP, in all layers, or on none: where one is not zero, the others get zeros. The
gated prompt attention (a softmax of its own, so no key or value of plain attention), a bias on the head (the
final norm has no constant to fold it into) and a sparse layout do not fold: they become tensors of
``SparseLlamaForCausalLM``, unless they are left out. The prompt's keys and values are those of the folded
projections, computed in fp64, so that their bits do not depend on how a matrix product is cut up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.merge import fold_bias, fold_weight, head_gates
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.export.left_out import Parts
from sparse_llama.export.shards import TensorSpec
from sparse_llama.layouts import Layout
from sparse_llama.model.exported.modeling_sparse_llama import SparseLlamaConfig, SparseLlamaForCausalLM
from sparse_llama.model.files import checkpoint_tensors

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CODE = "modeling_sparse_llama"
_BIAS_FLAGS = {".self_attn.": "attention_bias", ".mlp.": "mlp_bias"}  # of all such layers, or of none


@dataclass(frozen=True)
class MergedModel:
    """What a merged export will be, before any weight is read."""

    base: LlamaConfig
    config: LlamaConfig
    """A ``SparseLlamaConfig`` if anything is left that plain LLaMA cannot hold."""
    adapter: dict[str, torch.Tensor]
    """The trained tensors that are kept, fp32, by their names in the adapted model."""
    gates: dict[int, torch.Tensor]
    """What multiplies each head's prompt attention, (H,) fp32, by layer; only where it is not zero."""
    layouts: tuple[Layout, ...]

    @property
    def needs_code(self) -> bool:
        return isinstance(self.config, SparseLlamaConfig)

    def config_json(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the export's ``config.json``."""
        document = self.config.to_dict()
        for key in ("_name_or_path", "auto_map"):  # not the base's name, nor code that it may have brought
            document.pop(key, None)
        document |= {"dtype": str(dtype).removeprefix("torch."), "architectures": ["LlamaForCausalLM"]}
        if self.needs_code:
            document["architectures"] = [SparseLlamaForCausalLM.__name__]
            document["auto_map"] = {
                "AutoConfig": f"{_CODE}.{SparseLlamaConfig.__name__}",
                "AutoModelForCausalLM": f"{_CODE}.{SparseLlamaForCausalLM.__name__}",
            }
        else:
            document |= _older_rope(document["rope_parameters"])
        return document

    def specs(self, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Return every tensor that will be written; integers (the layout) keep their type."""
        kind = SparseLlamaForCausalLM if self.needs_code else LlamaForCausalLM
        with torch.device("meta"):
            model = kind(self.config)  # type: ignore[arg-type]
        specs = {
            name: TensorSpec(tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in model.state_dict().items()
        }
        if self.config.tie_word_embeddings:
            del specs[_HEAD]
        return specs


def plan_merge(
    base: LlamaConfig,
    settings: AdapterSettings,
    adapter: dict[str, torch.Tensor],
    layer_layouts: Sequence[Layout | None],
    left_out: Parts = frozenset(),
) -> MergedModel:
    """Return what merging ``adapter`` into ``base`` gives.

    Args:
        adapter: the trained tensors, which are known to belong to ``base``.
        layer_layouts: of every layer of the adapted model; None is full causal attention.
        left_out: what is not exported, whether it is there or not.
    """
    kept = _without(adapter, left_out)
    prompts = _acting_gates(kept, settings, base)
    layouts = () if "layout" in left_out else sparse_ones(layer_layouts)
    has_head_bias = _is_nonzero(kept.get("lm_head.adapter_bias"))
    document = base.to_dict() | {
        flag: bool(getattr(base, flag)) or _shifts(kept, group) for group, flag in _BIAS_FLAGS.items()
    }
    if _is_nonzero(kept.get("lm_head.adapter_scale"), but=1):
        document["tie_word_embeddings"] = False  # the scale is the head's; the embedding has none
    if not prompts and not has_head_bias and not layouts:
        return MergedModel(base, LlamaConfig.from_dict(document), kept, {}, ())
    document.pop("model_type", None)
    document |= {
        "prompt_layers": list(prompts),
        "prompt_length": settings.prompt_length if prompts else 0,
        "lm_head_bias": has_head_bias,
        "layouts": [_sizes(layout) for layout in layouts],
        "layer_layouts": [layouts.index(one) if one in layouts else None for one in layer_layouts],
    }
    return MergedModel(base, SparseLlamaConfig.from_dict(document), kept, prompts, layouts)


def sparse_ones(layer_layouts: Sequence[Layout | None]) -> tuple[Layout, ...]:
    """Return the distinct layouts that leave any pair of tokens out."""
    distinct = dict.fromkeys(layout for layout in layer_layouts if layout is not None)
    return tuple(layout for layout in distinct if not layout.is_causal_at(layout.num_tokens))


def merged_tensors(merged: MergedModel, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of ``merged.specs``, each once; those of the base as its files in ``folder`` come.

    One tensor is in memory at a time, and the prompts' keys and values until the end.
    """
    prompts = _Prompts(merged)
    is_tied = bool(merged.base.tie_word_embeddings)
    for name, tensor in checkpoint_tensors(folder):
        if name.endswith("rotary_emb.inv_freq") or (is_tied and name == _HEAD):
            continue
        yield from _fold(merged, prompts, name, tensor)
        if is_tied and name == _EMBEDDING:
            head = dict(_fold(merged, prompts, _HEAD, tensor))
            if merged.config.tie_word_embeddings:
                del head[_HEAD]
            yield from head.items()
    yield from prompts.tensors()
    for index, layout in enumerate(merged.layouts):
        yield from layout_tensors(layout, index).items()


def layout_tensors(layout: Layout, index: int) -> dict[str, torch.Tensor]:
    """Return a layout as ``BlockLayout`` holds it, by the names in the exported model."""
    starts = torch.cat([pattern.starts for pattern in layout.patterns])
    counts = torch.tensor([0, *(pattern.starts.numel() for pattern in layout.patterns)]).cumsum(0)
    row_starts = [
        pattern.row_starts + count for pattern, count in zip(layout.patterns, counts[:-1], strict=True)
    ]
    return {
        f"layouts.{index}.row_starts": torch.stack(row_starts),
        f"layouts.{index}.starts": starts,
        f"layouts.{index}.ends": torch.cat([pattern.ends for pattern in layout.patterns]),
        f"layouts.{index}.head_patterns": torch.tensor(layout.head_patterns, dtype=torch.int64),
    }


def _older_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings by the names of transformers before 5, which would otherwise take its own
    defaults in silence; transformers 5 reads either."""
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling if is_scaled else None}


def _sizes(layout: Layout) -> dict[str, int]:
    return {
        "block": layout.block,
        "num_blocks": layout.num_blocks,
        "num_patterns": len(layout.patterns),
        "num_intervals": sum(pattern.starts.numel() for pattern in layout.patterns),
    }


def _fold(
    merged: MergedModel, prompts: "_Prompts", name: str, tensor: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what one tensor of the base becomes: itself, its folded self, and a bias that it had not."""
    module, _, kind = name.rpartition(".")
    scale, shift = (merged.adapter.get(f"{module}.adapter_{part}") for part in ("scale", "bias"))
    if kind == "bias":
        outputs = {name: fold_bias(tensor, scale, shift)}
    else:
        outputs = {name: fold_weight(merged.adapter.get(name, tensor), scale)}  # norms are trained themselves
        if _gets_bias(merged, module):
            bias = fold_bias(None, scale, shift)
            outputs[f"{module}.bias"] = torch.zeros(tensor.shape[0]) if bias is None else bias
    for output_name, output in outputs.items():
        assert output is not None, f"{output_name}: the base's own bias is gone"
        prompts.add(output_name, output)
        yield output_name, output


def _gets_bias(merged: MergedModel, module: str) -> bool:
    """Return whether a linear layer has a bias in the export and none in the base."""
    if module == "lm_head":
        return bool(getattr(merged.config, "lm_head_bias", False))
    for group, flag in _BIAS_FLAGS.items():
        if group in module:
            return bool(getattr(merged.config, flag)) and not getattr(merged.base, flag)
    return False


def _without(adapter: dict[str, torch.Tensor], left_out: Parts) -> dict[str, torch.Tensor]:
    def is_kept(name: str) -> bool:
        if ".zero_init." in name:
            return "prompt" not in left_out
        return name != "lm_head.adapter_bias" or "head_bias" not in left_out

    return {name: tensor for name, tensor in adapter.items() if is_kept(name)}


def _acting_gates(
    adapter: dict[str, torch.Tensor], settings: AdapterSettings, base: LlamaConfig
) -> dict[int, torch.Tensor]:
    is_tanh = settings.gate_activation == "tanh"
    gates = {
        layer: adapter.get(f"{_attention(layer)}.zero_init.gate") for layer in range(base.num_hidden_layers)
    }
    return {
        layer: head_gates(gate, base.num_attention_heads, is_tanh=is_tanh)  # type: ignore[arg-type]
        for layer, gate in gates.items()
        if gate is not None and _is_nonzero(gate)
    }


def _shifts(adapter: dict[str, torch.Tensor], group: str) -> bool:
    """Return whether any linear layer of ``group`` gets a bias that is not zero."""
    return any(
        group in name and name.endswith(".adapter_bias") and _is_nonzero(tensor)
        for name, tensor in adapter.items()
    )


def _is_nonzero(tensor: torch.Tensor | None, *, but: float = 0) -> bool:
    """Return whether there is a tensor with any value other than zero, or than ``but``."""
    return tensor is not None and bool((tensor != but).any())


def _attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


class _Prompts:
    """The keys and values of all prompts, W P + b, summed up as weights and biases come by."""

    def __init__(self, merged: MergedModel) -> None:
        self._merged = merged
        self._sums: dict[str, torch.Tensor] = {}  # (P, K * D) fp64
        self._home = {
            f"{_attention(layer)}.{projection}": (layer, f"{_attention(layer)}.prompt.{part}")
            for layer in merged.gates
            for projection, part in (("k_proj", "key"), ("v_proj", "value"))
        }

    def add(self, name: str, tensor: torch.Tensor) -> None:
        module, _, kind = name.rpartition(".")
        if module not in self._home:
            return
        layer, output = self._home[module]
        part = tensor.double()
        if kind == "weight":
            part = self._merged.adapter[f"{_attention(layer)}.zero_init.prompt"].double() @ part.T
        self._sums[output] = self._sums.get(output, 0) + part

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield keys and values, (K, P, D), and the gates, (H,)."""
        for name, total in self._sums.items():
            # (P, K * D) -> (K, P, D); a tensor of its own: the writer casts and copies
            yield name, total.unflatten(1, (-1, self._merged.base.head_dim)).transpose(0, 1)  # type: ignore[arg-type]
        for layer, gate in self._merged.gates.items():
            yield f"{_attention(layer)}.prompt.gate", gate
