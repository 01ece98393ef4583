"""The original LLaMA-Adapter's files (OpenGVLab/LLaMA-Adapter, 521a09d): v1, and the text part of v2.

v1 (``alpaca_finetuning_v1``) holds a gate for every layer and one table of all prompts, the last layers' in
order. v2 (``llama_adapter_v2_multimodal7b``) adds norms and biases on wq, wo, w1, w2 and w3 under ``llama.``.
Gates go through tanh. A prompt's length is in no adapter file: it is worked out, or in a checkpoint's
arguments.

``C`` model width, ``H`` query heads, ``P`` prompt tokens.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig

from sparse_llama.adapters.interop import rows
from sparse_llama.adapters.interop.bases import difference_notices, first_llama_misfit, rope_differences
from sparse_llama.adapters.interop.files import StoredAdapter
from sparse_llama.adapters.interop.gates import tanh_gates
from sparse_llama.adapters.interop.ours import (
    LAST_NORM,
    ForeignAdapter,
    complete,
    gate_name,
    head_dim,
    is_identity,
    linear_name,
    norm_name,
    prompt_name,
)
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import CheckpointError, ExportError

FORMAT = "llama-adapter"
FILE_NAME = "adapter.pth"
_PROMPTS, _LENGTH = "adapter_query.weight", "adapter_len"
_RELEASED_LENGTH = 10  # prompt tokens of every adapter that was released
_V1_LAYERS, _MULTIMODAL_LAYERS = 30, 31  # and their adapted layers
_LINEARS = {
    "attention.wq": "q_proj",
    "attention.wo": "o_proj",
    "feed_forward.w1": "gate_proj",
    "feed_forward.w2": "down_proj",
    "feed_forward.w3": "up_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_LAYER = re.compile(r"(?:llama\.)?layers\.(\d+)\.(.+)")
_BASE = re.compile(
    r"(llama\.)?(tok_embeddings|output)\.weight|.*rope\.freqs"
    r"|(llama\.)?layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.weight"
)
_REFUSED = {
    r"(clip|visual_)": "the multimodal model adds an image's features to every prompt, and a prompt here is "
    "one for all inputs; keep its llama.* tensors and adapter_query alone to read the text model",
    r".*\.lora_": "its linear layers have LoRA too, which is no LLaMA-Adapter; merge it into the base first",
    r".*\.w[qkvo123]_(scale|bias)": "the chat65b code scales the inputs of linear layers, and here outputs "
    "are scaled; train it again here",
}
_ROUNDING = "its own code rounds tanh(gate) to fp16"
_NO_TANH = "its example.py leaves out the tanh that it trains with"


def matches(stored: StoredAdapter) -> bool:
    """Whether these are tensors of Meta's names with something of an adapter among them."""
    return any(
        name == _PROMPTS or name.endswith(".attention.gate") or any(re.match(key, name) for key in _REFUSED)
        for name in stored.tensors
    )


def named_base(stored: StoredAdapter) -> str | None:
    """Return the base that the file names."""
    return None


def read(stored: StoredAdapter, base: LlamaConfig) -> ForeignAdapter:
    """Return an original v1 or v2 text adapter as ours, its gates through tanh."""
    source = str(stored.path)
    held = _held(stored)
    gates, is_linear = _read_gates(held)
    if not gates or _PROMPTS not in held:
        raise CheckpointError(f"{source}: no {'gates' if _PROMPTS in held else _PROMPTS} in it; save both")
    prompts = held[_PROMPTS]
    last = max(gates) + 1
    count, guess = _count_adapted(stored, prompts.shape[0], gates)
    adapted = range(last - count, last)
    ours = {gate_name(layer): gates[layer].flatten() for layer in adapted if layer in gates}
    blocks = prompts.chunk(len(adapted))  # (P, C) each
    ours |= {prompt_name(layer): block for layer, block in zip(adapted, blocks, strict=True)}
    for name, tensor in held.items():
        if name != _PROMPTS and not name.endswith(("attention.gate", "attention.new_gate")):
            ours |= _trained_linear_or_norm(name, tensor, base, source)
    settings, tensors = complete(ours, base, source=source, gate_activation="none" if is_linear else "tanh")
    notices = (_ROUNDING, *((_NO_TANH,) if settings.version == "v1" else ()), *guess)
    if is_linear:
        notices += ("its gates were read as new_gate * tanh(gate); training on with them differs",)
    return ForeignAdapter(FORMAT, settings, tensors, notices, None)


def to_tensors(
    settings: AdapterSettings, tensors: Mapping[str, torch.Tensor], base: LlamaConfig
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return an adapter of ours as the original's tensors, and the notices; v2's are those under ``llama.``.

    Raises:
        ExportError: its code has no such base, or no place for a tensor.
    """
    if reason := first_llama_misfit(base):
        raise ExportError(f"--format {FORMAT}: {reason}; use --format litgpt or native")
    layers = settings.prompt_layers(base.num_hidden_layers)
    gates, notices = tanh_gates(FORMAT, settings, tensors, layers)
    trained = _written_linears_and_norms(tensors, base)
    prefix = "llama." if trained else ""
    theirs = {_PROMPTS: torch.cat([tensors[prompt_name(layer)] for layer in layers])}
    for layer in range(base.num_hidden_layers):
        gate = gates.get(layer, torch.zeros(1)).expand(base.num_attention_heads)  # (H,)
        theirs[f"{prefix}layers.{layer}.attention.gate"] = gate.reshape(1, -1, 1, 1)
    if settings.gate == "scalar":
        notices += (
            "its code has a gate per head: a layer's one gate was written for each; training differs",
        )
    expected = (_MULTIMODAL_LAYERS if trained else _V1_LAYERS, _RELEASED_LENGTH)
    if (len(layers), settings.prompt_length) != expected:
        keys = ("query_layer", "query_len") if trained else ("adapter_layer", "adapter_len")
        notices += (
            f"its code has to be given {keys[0]} {len(layers)} and {keys[1]} {settings.prompt_length}",
        )
    if trained:
        notices += ("its multimodal code adds an image's features to the prompts: it gives other outputs",)
    else:
        notices += (_NO_TANH,)
    rope = difference_notices("its code", rope_differences(base))
    return theirs | trained, (_ROUNDING, *notices, *rope)


def write(
    folder: Path,
    settings: AdapterSettings,
    tensors: Mapping[str, torch.Tensor],
    base: LlamaConfig,
    base_model: str,
) -> tuple[str, ...]:
    """Write the file into ``folder`` and return the notices."""
    theirs, notices = to_tensors(settings, tensors, base)
    whole = {name: tensor.contiguous().clone() for name, tensor in theirs.items()}
    length = settings.prompt_length
    if any(name.startswith("llama.") for name in whole):
        config = {"w_bias": True, "w_lora": False, "lora_rank": 16, "query_len": length}
        torch.save({"model": whole, "config": config}, folder / FILE_NAME)
    else:
        # Its programs pass over a name that they do not know (strict=False), and this reader needs the
        # length.
        is_told = length == _RELEASED_LENGTH
        torch.save(whole if is_told else whole | {_LENGTH: torch.tensor(length)}, folder / FILE_NAME)
    return notices


def _held(stored: StoredAdapter) -> dict[str, torch.Tensor]:
    """Return the tensors that are not the base's."""
    held = {name: tensor for name, tensor in stored.tensors.items() if not _BASE.fullmatch(name)}
    is_whole = len(held) < len(stored.tensors)
    held.pop(_LENGTH, None)
    for pattern, reason in _REFUSED.items():
        if name := next((name for name in held if re.match(pattern, name)), None):
            raise CheckpointError(f"{stored.path}: has {name}; {reason}")
    if is_whole and not any(name.endswith(".bias") for name in held):
        # A training checkpoint of v1, with the whole base: its norms are the base's.
        held = {name: tensor for name, tensor in held.items() if "norm" not in name}
    return held


def _read_gates(held: Mapping[str, torch.Tensor]) -> tuple[dict[int, torch.Tensor], bool]:
    """Return every layer's gate, before tanh or, where a trained new_gate follows it, as it multiplies; and
    whether it is the latter."""
    gates, new_gates = (
        {
            int(found[1]): tensor
            for name, tensor in held.items()
            if (found := _LAYER.fullmatch(name)) and found[2] == rest
        }
        for rest in ("attention.gate", "attention.new_gate")
    )
    if all(bool((tensor == 1).all()) for tensor in new_gates.values()):
        return gates, False
    return {layer: gate.float().tanh() * new_gates[layer].float() for layer, gate in gates.items()}, True


def _count_adapted(
    stored: StoredAdapter, num_rows: int, gates: Mapping[int, torch.Tensor]
) -> tuple[int, tuple[str, ...]]:
    """Return how many of the last layers share ``num_rows`` rows of prompts, and a notice if it is a guess.

    A training checkpoint's arguments and the files written here say a prompt's length. Else a layer without a
    prompt is one whose gate has stayed 0; where no gate or every gate has moved, the released length is
    taken, as its own ``example.py`` does."""
    num_layers = max(gates) + 1
    trained = [layer for layer, gate in gates.items() if bool((gate != 0).any())]
    length = _stated_length(stored) or _RELEASED_LENGTH
    counts = [num_rows // length] if num_rows % length == 0 else []
    if _stated_length(stored) is None and 0 < len(trained) < len(gates):
        counts.insert(0, num_layers - min(trained))
    for count in counts:
        if 0 < count <= num_layers and num_rows % count == 0:
            is_told = _stated_length(stored) is not None or len(trained) == count
            guess = f"read as {num_rows // count} prompt tokens in each of the last {count} layers"
            return count, () if is_told else (f"{guess}: the file does not say",)
    raise CheckpointError(
        f"{stored.path}: nothing says how its {num_rows} prompt rows are shared among {num_layers} layers; "
        "name the training checkpoint (checkpoint-N.pth), whose args hold adapter_len"
    )


def _stated_length(stored: StoredAdapter) -> int | None:
    config, told = stored.beside.get("config"), stored.tensors.get(_LENGTH)
    found = [
        getattr(stored.beside.get("args"), "adapter_len", None),
        config.get("query_len") if isinstance(config, Mapping) else None,
        None if told is None or told.numel() != 1 else int(told),
    ]
    return next((length for length in found if isinstance(length, int) and length > 0), None)


def _trained_linear_or_norm(
    name: str, tensor: torch.Tensor, base: LlamaConfig, source: str
) -> dict[str, torch.Tensor]:
    """Return a norm or a bias under our name, in our row order."""
    if name in ("norm.weight", "llama.norm.weight"):
        return {LAST_NORM: tensor}
    found = _LAYER.fullmatch(name)
    layer, (module, _, kind) = (int(found[1]), found[2].rpartition(".")) if found else (-1, ("", "", ""))
    if module in _NORMS and kind == "weight":
        return {norm_name(layer, _NORMS[module]): tensor}
    if module in _LINEARS and kind == "bias":
        whole = rows.halves(tensor, head_dim(base)) if module == "attention.wq" else tensor
        return {f"{linear_name(layer, _LINEARS[module])}.adapter_bias": whole}
    raise CheckpointError(
        f"{source}: {name} is no tensor of a LLaMA-Adapter; save the adapter's tensors alone"
    )


def _written_linears_and_norms(
    tensors: Mapping[str, torch.Tensor], base: LlamaConfig
) -> dict[str, torch.Tensor]:
    """Return norms and biases under the multimodal code's names, in its row order; scales of ones and other
    layers' biases of zeros do nothing and are left out."""
    names = {LAST_NORM: "llama.norm.weight"}
    for layer in range(base.num_hidden_layers):
        prefix = f"llama.layers.{layer}"
        names |= {norm_name(layer, ours): f"{prefix}.{theirs}.weight" for theirs, ours in _NORMS.items()}
        for theirs, ours in _LINEARS.items():
            names[f"{linear_name(layer, ours)}.adapter_bias"] = f"{prefix}.{theirs}.bias"
    written: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name in names:
            is_query = name.endswith("q_proj.adapter_bias")
            written[names[name]] = rows.interleaved(tensor, head_dim(base)) if is_query else tensor
        elif ".zero_init." not in name and not is_identity(name, tensor):
            raise ExportError(
                f"--format {FORMAT}: the adapter has {name}, and its code has norms and biases on q, o, "
                "gate, up and down projections only; train with sparse_llama.adapter.scale false, lm_head "
                'false and bias ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], or use another '
                "format"
            )
    return written
