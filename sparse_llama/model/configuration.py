"""A base's ``config.json``, every size in it checked before anything is made of it.

transformers makes a model of whatever sizes it reads: of 2**31 layers until memory ends, of heads that share
nothing evenly until the first forward pass.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sparse_llama.config.section import Section, quote, show_plain
from sparse_llama.config.tables import read_table
from sparse_llama.errors import ConfigError, ModelError

_MOST_LAYERS, _MOST_WIDE = 2**12, 2**24
"""Far above every LLaMA: 126 layers, 128,256 tokens of vocabulary."""
_Size = Annotated[int, Field(ge=1, le=_MOST_WIDE)]


class _Sizes(Section):
    """What is read of ``config.json`` here; a size that is not there is transformers' default."""

    model_config = ConfigDict(extra="ignore")

    hidden_size: _Size = 1
    intermediate_size: _Size = 1
    num_hidden_layers: Annotated[int, Field(ge=1, le=_MOST_LAYERS)] = 1
    num_attention_heads: _Size = 1
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    vocab_size: _Size = 1
    max_position_embeddings: Annotated[int, Field(ge=1, lt=2**31)] = 1
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    initializer_range: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pad_token_id: int | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False


def read_config(folder: Path) -> LlamaConfig:
    """Return the configuration of the LLaMA in ``folder``.

    Raises:
        ModelError: there is none, it is of something else, or no model can be made of it.
    """
    path, document = folder / "config.json", read_config_json(folder)
    if document.get("model_type") != "llama":
        found = quote(str(document.get("model_type")))
        raise ModelError(f'{path}: model_type is {found}; only "llama" can be adapted')
    if document.get("quantization_config"):
        raise ModelError(f"{path}: the weights are quantized; give the model they were quantized from")
    try:
        _Sizes.parse(document)
    except ConfigError as error:
        raise ModelError(f"{path}: {error}; copy it again") from None
    try:
        config = LlamaConfig.from_dict(document)
        rotation = LlamaRotaryEmbedding(config=config).inv_freq
    except Exception as error:  # of transformers' checks, whichever it is: of a value that no base has
        reason = show_plain(str(error))
        raise ModelError(f"{path}: no LLaMA's ({type(error).__name__}: {reason}); copy it again") from error
    if reason := _misfit(config, rotation):
        raise ModelError(f"{path}: {reason}; copy it again")
    return config


def read_config_json(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of ``folder`` as a table.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    try:
        return read_table(folder / "config.json", ModelError)
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder}: no config.json; a model folder holds config.json, weights and a tokenizer"
        ) from error


def _misfit(config: LlamaConfig, rotation: torch.Tensor) -> str | None:
    """Return which sizes do not go together; None where all do."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    width = config.head_dim or config.hidden_size // heads
    if heads % kv_heads:
        return f"num_attention_heads ({heads}) is no multiple of num_key_value_heads ({kv_heads})"
    if not config.head_dim and config.hidden_size % heads:
        return f"hidden_size ({config.hidden_size}) is no multiple of num_attention_heads ({heads})"
    if width % 2:
        return f"heads are {width} wide, and positions turn pairs: head_dim must be even"
    pad, vocabulary = config.pad_token_id, config.vocab_size
    if pad is not None and not -vocabulary <= pad < vocabulary:
        return f"pad_token_id is {pad}, outside of the {vocabulary} tokens of the vocabulary"
    if config.hidden_act not in ACT2FN:
        return f"hidden_act is {quote(config.hidden_act)}, which transformers does not know"
    if not bool(torch.isfinite(rotation).all()):
        return "its rotary settings turn positions by no finite angles"
    return None
