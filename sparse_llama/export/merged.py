"""A LLaMA with its adapter merged: what of it folds into plain weights, what does not, and all its tensors.

Scales and biases fold (``adapters/merge.py``), norms are copied. The gated prompt attention (a softmax of its
own, so no key or value of plain attention), a bias on the head (the final norm has no constant to fold it
into) and a sparse layout do not: they become tensors of ``SparseLlamaForCausalLM``. The prompt's keys and
values are those of the folded projections, computed in fp64, so that their bits do not depend on how a matrix
product is cut up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.merge import fold_bias, fold_weight
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.export.shards import TensorSpec
from sparse_llama.layouts import Layout
from sparse_llama.model.exported.modeling_sparse_llama import SparseLlamaConfig, SparseLlamaForCausalLM
from sparse_llama.model.files import checkpoint_tensors

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CODE = "modeling_sparse_llama"


@dataclass(frozen=True)
class MergedModel:
    """What a merged export will be, before any weight is read."""

    base: LlamaConfig
    config: LlamaConfig
    """A ``SparseLlamaConfig`` if anything is left that plain LLaMA cannot hold."""
    adapter: dict[str, torch.Tensor]
    """The trained tensors, fp32, by their names in the adapted model."""
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
) -> MergedModel:
    """Return what merging ``adapter`` into ``base`` gives.

    Args:
        adapter: the trained tensors, which are known to belong to ``base``.
        layer_layouts: of every layer of the adapted model; None is full causal attention.
    """
    document = base.to_dict()
    if settings.version == "v2":
        document |= {"attention_bias": True, "mlp_bias": True}
        if bool((adapter["lm_head.adapter_scale"] != 1).any()):
            document["tie_word_embeddings"] = False  # the scale is the head's; the embedding has none
    prompts = [
        index
        for index in range(base.num_hidden_layers)
        if f"{_attention(index)}.zero_init.gate" in adapter
        and bool((adapter[f"{_attention(index)}.zero_init.gate"] != 0).any())
    ]
    head_bias = adapter.get("lm_head.adapter_bias")
    has_head_bias = head_bias is not None and bool((head_bias != 0).any())
    layouts = sparse_ones(layer_layouts)
    if not prompts and not has_head_bias and not layouts:
        return MergedModel(base, LlamaConfig.from_dict(document), adapter, ())
    document.pop("model_type", None)
    document |= {
        "prompt_layers": prompts,
        "prompt_length": settings.prompt_length if prompts else 0,
        "lm_head_bias": has_head_bias,
        "layouts": [_sizes(layout) for layout in layouts],
        "layer_layouts": [layouts.index(one) if one in layouts else None for one in layer_layouts],
    }
    return MergedModel(base, SparseLlamaConfig.from_dict(document), adapter, layouts)


def sparse_ones(layer_layouts: Sequence[Layout | None]) -> tuple[Layout, ...]:
    """Return the distinct layouts that leave any pair of tokens out."""
    distinct = dict.fromkeys(layout for layout in layer_layouts if layout is not None)
    return tuple(layout for layout in distinct if not layout.is_causal_at(layout.num_tokens))


def merged_tensors(merged: MergedModel, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of ``merged.specs``, each once; those of the base as its files in ``folder`` come.

    One tensor is in memory at a time, and the prompts' keys and values until the end.
    """
    prompts = _Prompts(merged)
    for name, tensor in checkpoint_tensors(folder):
        is_tied = merged.base.tie_word_embeddings
        if name.endswith("rotary_emb.inv_freq") or (is_tied and name == _HEAD):
            continue
        yield from _fold(merged, prompts, name, tensor)
        if is_tied and name == _EMBEDDING and "lm_head.adapter_scale" in merged.adapter:
            for output, folded in _fold(merged, prompts, _HEAD, tensor):
                if output != _HEAD or not merged.config.tie_word_embeddings:
                    yield output, folded
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
    scale = merged.adapter.get(f"{module}.adapter_scale")
    if scale is None:
        output = merged.adapter.get(name, tensor)  # norms are trained as they are
        prompts.add(name, output)
        yield name, output
        return
    shift = merged.adapter[f"{module}.adapter_bias"]
    if kind == "bias":
        outputs = {name: fold_bias(tensor, scale, shift)}
    else:
        outputs = {name: fold_weight(tensor, scale)}
        if not _has_bias(merged.base, module) and (
            module != "lm_head" or getattr(merged.config, "lm_head_bias", False)
        ):
            outputs[f"{module}.bias"] = fold_bias(None, scale, shift)
    for output_name, output in outputs.items():
        prompts.add(output_name, output)
        yield output_name, output


def _has_bias(base: LlamaConfig, module: str) -> bool:
    if module == "lm_head":
        return False
    return bool(base.attention_bias if ".self_attn." in module else base.mlp_bias)


def _attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


class _Prompts:
    """The keys and values of all prompts, W P + b, summed up as weights and biases come by."""

    def __init__(self, merged: MergedModel) -> None:
        self._merged = merged
        self._layers: list[int] = list(getattr(merged.config, "prompt_layers", ()))
        self._sums: dict[str, torch.Tensor] = {}  # (P, K * D) fp64
        self._home = {
            f"{_attention(layer)}.{projection}": (layer, f"{_attention(layer)}.prompt.{part}")
            for layer in self._layers
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
        for layer in self._layers:
            attention = _attention(layer)
            yield f"{attention}.prompt.gate", self._merged.adapter[f"{attention}.zero_init.gate"]
