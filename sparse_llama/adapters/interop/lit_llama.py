"""lit-llama's ``lit-llama-adapter-finetuned.pth`` (``lit_llama/adapter.py`` and ``adapter_v2.py``, 2a464de).

It loads an adapter with ``strict=False``: what ours lacks is left out, and stays what the base has or does
nothing.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig

from sparse_llama.adapters.interop.bases import difference_notices, first_llama_misfit, rope_differences
from sparse_llama.adapters.interop.files import StoredAdapter
from sparse_llama.adapters.interop.gates import linear_gates
from sparse_llama.adapters.interop.lit import GATE, Dialect, default_notices, to_ours, to_theirs
from sparse_llama.adapters.interop.ours import ForeignAdapter, complete
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import CheckpointError, ExportError

FORMAT = "lit-llama"
FILE_NAME = "lit-llama-adapter-finetuned.pth"
_DIALECT = Dialect(
    format=FORMAT,
    fused="attn.c_attn",
    modules={
        "o_proj": "attn.c_proj",
        "gate_proj": "mlp.c_fc1",
        "up_proj": "mlp.c_fc2",
        "down_proj": "mlp.c_proj",
    },
    norms={"input_layernorm": "rms_1.scale", "post_attention_layernorm": "rms_2.scale"},
    last_norm="transformer.ln_f.scale",
    is_interleaved=True,
)


def matches(stored: StoredAdapter) -> bool:
    """Whether these are lit-llama's tensors; litgpt's are asked for first, as some names are the same."""
    return any(name.startswith("transformer.h.") for name in stored.tensors)


def named_base(stored: StoredAdapter) -> str | None:
    """Return the base that the file names."""
    return None


def read(stored: StoredAdapter, base: LlamaConfig) -> ForeignAdapter:
    """Return lit-llama's adapter as ours."""
    source = str(stored.path)
    ours = to_ours(_DIALECT, stored.tensors, base, source)
    settings, tensors = complete(ours, base, source=source)
    if settings.version == "v2" and (reason := first_llama_misfit(base)):
        raise CheckpointError(f"{source}: a v2 adapter of {FORMAT}: {reason}; it was trained on another base")
    return ForeignAdapter(FORMAT, settings, tensors, (), None)


def to_tensors(
    settings: AdapterSettings, tensors: Mapping[str, torch.Tensor], base: LlamaConfig
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return an adapter of ours as lit-llama's tensors, and the notices.

    Raises:
        ExportError: lit-llama has no such base.
    """
    if reason := first_llama_misfit(base):
        raise ExportError(f"--format {FORMAT}: {reason}; use --format litgpt or native")
    layers = settings.prompt_layers(base.num_hidden_layers)
    gates, notices = linear_gates(FORMAT, settings, tensors, layers)
    theirs = to_theirs(
        _DIALECT,
        settings,
        tensors,
        base,
        padded_vocabulary=-(-base.vocab_size // 64) * 64,  # lit_llama/model.py, LLaMAConfig
        is_whole=False,
    )
    for layer, gate in gates.items():
        # Its first files had one gate for all heads, of one axis, which it still reads.
        shape = (1,) if settings.gate == "scalar" else (1, -1, 1, 1)
        theirs[f"transformer.h.{layer}.{GATE}"] = gate.reshape(shape)
    return theirs, (*notices, *default_notices(_DIALECT, settings, base), *_differences(base))


def write(
    folder: Path,
    settings: AdapterSettings,
    tensors: Mapping[str, torch.Tensor],
    base: LlamaConfig,
    base_model: str,
) -> tuple[str, ...]:
    """Write the file into ``folder`` and return the notices; v1 and v2 have the same name."""
    theirs, notices = to_tensors(settings, tensors, base)
    torch.save({name: tensor.contiguous().clone() for name, tensor in theirs.items()}, folder / FILE_NAME)
    return notices


def _differences(base: LlamaConfig) -> tuple[str, ...]:
    """Return what lit-llama itself computes otherwise than this base's configuration says."""
    inner = -(-(8 * base.hidden_size // 3) // 256) * 256
    found: dict[str, tuple[object, object]] = {}
    if base.intermediate_size != inner:
        found["intermediate_size"] = (base.intermediate_size, inner)
    if base.rms_norm_eps != 1e-5:
        found["rms_norm_eps"] = (base.rms_norm_eps, 1e-5)
    return difference_notices(FORMAT, found | rope_differences(base))
