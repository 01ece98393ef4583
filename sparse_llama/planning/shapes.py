"""The base of a run that is only planned: its configuration, without its weights.

A plan needs ``config.json`` alone. Where neither the model nor the network is at hand, the shapes of
well-known LLaMAs are here: facts of their published ``config.json``, checked by the number of parameters
that each is published with.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from sparse_llama.config.paths import expand, is_folder
from sparse_llama.config.settings import ModelSettings
from sparse_llama.errors import ModelError
from sparse_llama.model.configuration import read_config
from sparse_llama.model.files import resolve_model


@dataclass(frozen=True)
class Base:
    """A LLaMA's configuration, and what to say about where it is from."""

    config: LlamaConfig
    notice: str | None = None


def find_base(model: ModelSettings) -> Base:
    """Return the configuration of the run's base; no weights are read or downloaded.

    In this order: a folder or a bundled model; a hub id's ``config.json`` in the cache; the table of this
    module; the hub.

    Raises:
        ModelError: there is no such folder, the configuration is not a LLaMA's, or it cannot be had.
    """
    name = model.path
    if name.startswith("bundled:") or is_folder(expand(name)):
        return Base(read_config(resolve_model(name)))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        return Base(read_config(resolve_model(name)))  # which says what is wrong with the name
    cached = _cached(name, model.revision)
    if cached is not None:
        return Base(read_config(cached.parent))
    if name in KNOWN_BASES:
        notice = f"{name} is not on this machine: its shape is from this program's table of known LLaMAs"
        return Base(LlamaConfig(**KNOWN_BASES[name]), notice)
    return Base(read_config(_download(name, model.revision).parent))


def head_widths(config: LlamaConfig) -> tuple[int, int]:
    """Return the width of all query heads and of all key heads together."""
    heads = config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // heads
    return heads * head_dim, (config.num_key_value_heads or heads) * head_dim


def linear_outputs(config: LlamaConfig) -> dict[str, int]:
    """Return the width of the output of each linear layer of a decoder layer."""
    queries, keys = head_widths(config)
    return {
        "q_proj": queries,
        "k_proj": keys,
        "v_proj": keys,
        "o_proj": config.hidden_size,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
        "down_proj": config.hidden_size,
    }


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # 0.3 s, for hub ids only

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors or ValueErrors
        raise ModelError(
            f"{name}: its config.json is not on this machine and not available from the hub "
            f"({type(error).__name__}); give a local folder, or a base such as {next(iter(KNOWN_BASES))}"
        ) from error


def _shape(
    width: int, mlp_width: int, layers: int, heads: int, kv_heads: int, vocabulary: int, positions: int
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }


_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}
_LLAMA31 = {"rope_parameters": _LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}}
_LLAMA32 = {"rope_parameters": _LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}}
_LLAMA30 = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
_TIED = {"tie_word_embeddings": True}
_7B = _shape(4096, 11008, 32, 32, 32, 32000, 2048)
_13B = _shape(5120, 13824, 40, 40, 40, 32000, 2048)

KNOWN_BASES: dict[str, dict[str, Any]] = {
    "openlm-research/open_llama_3b": _shape(3200, 8640, 26, 32, 32, 32000, 2048),
    "openlm-research/open_llama_3b_v2": _shape(3200, 8640, 26, 32, 32, 32000, 2048),
    "openlm-research/open_llama_7b": _7B,
    "openlm-research/open_llama_7b_v2": _7B,
    "openlm-research/open_llama_13b": _13B,
    "huggyllama/llama-7b": _7B,
    "huggyllama/llama-13b": _13B,
    "meta-llama/Llama-2-7b-hf": _7B | {"max_position_embeddings": 4096},
    "meta-llama/Llama-2-13b-hf": _13B | {"max_position_embeddings": 4096},
    "meta-llama/Meta-Llama-3-8B": _shape(4096, 14336, 32, 32, 8, 128256, 8192) | _LLAMA30,
    "meta-llama/Llama-3.1-8B": _shape(4096, 14336, 32, 32, 8, 128256, 131072) | _LLAMA31,
    "meta-llama/Llama-3.2-1B": _shape(2048, 8192, 16, 32, 8, 128256, 131072) | _LLAMA32 | _TIED,
    "meta-llama/Llama-3.2-3B": _shape(3072, 8192, 28, 24, 8, 128256, 131072) | _LLAMA32 | _TIED,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _shape(2048, 5632, 22, 32, 4, 32000, 2048),
}
"""Arguments of ``LlamaConfig``, from each repository's ``config.json`` on huggingface.co."""
