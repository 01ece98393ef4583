"""litgpt's ``lit_model.pth.adapter`` and ``.adapter_v2`` (``litgpt/adapter.py`` and ``adapter_v2.py``,
0.5.13).

q | k | v with transformers' rows; before December 2024 (``attn.attn``) each group's q, k and v together.
Since then litgpt cuts the prompts' keys and values out of q | k | v as if they were still in groups, so that
its own model computes another function from the same tensors, unless there is one key/value head: one group.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig

from sparse_llama.adapters.interop import rows
from sparse_llama.adapters.interop.files import StoredAdapter
from sparse_llama.adapters.interop.gates import linear_gates
from sparse_llama.adapters.interop.lit import GATE, Dialect, default_notices, to_ours, to_theirs
from sparse_llama.adapters.interop.ours import (
    ForeignAdapter,
    complete,
    head_dim,
    is_identity,
    layer_of,
    num_kv_heads,
    outputs,
    prompt_name,
)
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import CheckpointError

FORMAT = "litgpt"
FILE_NAMES = {"v1": "lit_model.pth.adapter", "v2": "lit_model.pth.adapter_v2"}
_DIALECT = Dialect(
    format=FORMAT,
    fused="attn.qkv",
    modules={
        "o_proj": "attn.proj",
        "gate_proj": "mlp.fc_1",
        "up_proj": "mlp.fc_2",
        "down_proj": "mlp.proj",
    },
    norms={"input_layernorm": "norm_1.weight", "post_attention_layernorm": "norm_2.weight"},
    last_norm="transformer.ln_f.weight",
    is_interleaved=False,
)
_OLD_FUSED = re.compile(r"(transformer\.h\.\d+)\.attn\.attn\.(adapter_scale|adapter_bias)")
_OWN_NAME = re.compile(r"\.(norm_[12]\.weight|mlp\.(fc_[12]|proj)\.|attn\.(qkv|attn|proj)\.)|ln_f\.weight")


def matches(stored: StoredAdapter) -> bool:
    """Whether these are litgpt's tensors: by a name that only it has, by its gates' shape, or by "model"
    around them, where lit-llama has nothing."""
    names = [name for name in stored.tensors if name.startswith("transformer.")]
    return bool(names) and (
        stored.is_nested
        or any(_OWN_NAME.search(name) for name in names)
        or any(name.endswith(GATE) and _is_last_but_one(stored.tensors[name]) for name in names)
    )


def named_base(stored: StoredAdapter) -> str | None:
    """Return the base that litgpt's ``model_config.yaml`` beside the file names."""
    config = stored.path.with_name("model_config.yaml")
    if not config.is_file():
        return None
    try:
        text = config.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{config}: not text ({error}); copy it again") from error
    block = re.search(r"^hf_config:\n((?:[ \t]+.*\n?)+)", text, re.MULTILINE)
    keys = dict(re.findall(r"^[ \t]+(name|org): (\S+)$", block[1] if block else "", re.MULTILINE))
    return f"{keys['org']}/{keys['name']}" if keys.keys() >= {"org", "name"} else keys.get("name")


def read(stored: StoredAdapter, base: LlamaConfig) -> ForeignAdapter:
    """Return litgpt's adapter as ours."""
    source, tensors, is_old = str(stored.path), dict(stored.tensors), False
    for name in stored.tensors:
        if found := _OLD_FUSED.fullmatch(name):
            fused = tensors.pop(name)
            is_old = True
            if fused.numel() == sum(outputs(base)[part] for part in ("q_proj", "k_proj", "v_proj")):
                fused = rows.ungrouped(fused, num_kv_heads(base), head_dim(base))
            # one of another base is left as it is: that is told where it is split
            tensors[f"{found[1]}.{_DIALECT.fused}.{found[2]}"] = fused
    ours = _without_idle_layers(to_ours(_DIALECT, tensors, base, source))
    settings, whole = complete(ours, base, source=source)
    notices = () if is_old else _differences(base)
    return ForeignAdapter(FORMAT, settings, whole, notices, named_base(stored))


def to_tensors(
    settings: AdapterSettings, tensors: Mapping[str, torch.Tensor], base: LlamaConfig
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return an adapter of ours as litgpt's tensors, and the notices; every scale and bias is written,
    because litgpt loads strictly."""
    layers = settings.prompt_layers(base.num_hidden_layers)
    gates, notices = linear_gates(FORMAT, settings, tensors, layers)
    padded = _padded(base.vocab_size)
    is_v2 = settings.version == "v2"
    theirs = to_theirs(_DIALECT, settings, tensors, base, padded_vocabulary=padded, is_whole=is_v2)
    for layer, gate in gates.items():
        whole = gate.expand(base.num_attention_heads)  # (H,)
        theirs[f"transformer.h.{layer}.{GATE}"] = whole.reshape(1, 1, -1, 1)
    if settings.gate == "scalar":
        notices += (
            "litgpt has a gate per head: a layer's one gate was written for each; training on differs",
        )
    if is_v2 and padded != base.vocab_size:
        notices += (f"lm_head is padded from {base.vocab_size} to {padded}, litgpt's padded_vocab_size",)
    return theirs, (*_differences(base), *notices, *default_notices(_DIALECT, settings, base))


def write(
    folder: Path,
    settings: AdapterSettings,
    tensors: Mapping[str, torch.Tensor],
    base: LlamaConfig,
    base_model: str,
) -> tuple[str, ...]:
    """Write the file into ``folder`` and return the notices."""
    theirs, notices = to_tensors(settings, tensors, base)
    model = {name: tensor.contiguous().clone() for name, tensor in theirs.items()}
    torch.save({"model": model}, folder / FILE_NAMES[settings.version])
    return notices


def _differences(base: LlamaConfig) -> tuple[str, ...]:
    """Return what litgpt itself computes otherwise."""
    if num_kv_heads(base) == 1:
        return ()
    return (
        "litgpt itself computes another function from these tensors: since December 2024 it cuts its "
        "prompts' keys and values out of the wrong rows",
    )


def _padded(vocabulary: int) -> int:
    """Return litgpt's padded_vocab_size (``litgpt/config.py``): LLaMA's are multiples of 64, Code Llama's
    32016 stays."""
    multiple = 16 if vocabulary == 32016 else 64
    return -(-vocabulary // multiple) * multiple


def _without_idle_layers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the scales of ones and biases of zeros of layers below the first trained one: an adapter of the
    top layers only has them here, for strict loading."""
    trained = [
        layer
        for name, tensor in tensors.items()
        if (layer := layer_of(name)) is not None and not is_identity(name, tensor)
    ]
    first = min(trained, default=0)
    if prompt_name(first) not in tensors:
        return tensors
    layers = {name: layer_of(name) for name in tensors}
    return {name: tensors[name] for name, layer in layers.items() if layer is None or layer >= first}


def _is_last_but_one(gate: torch.Tensor) -> bool:
    return gate.dim() == 4 and gate.shape[2] > 1
