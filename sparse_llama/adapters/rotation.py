"""A base's configuration with other rotary settings: those that a run chose and its adapter belongs to."""

from typing import Any

import torch
from pydantic import ValidationError
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sparse_llama.config.rope import FixedRopeParameters, RopeType

# Their positions are divided by ``factor``: they reach as far as that takes, whatever the run's length.
_INTERPOLATED: tuple[RopeType, ...] = ("linear", "yarn")


def own_parameters(config: LlamaConfig) -> dict[str, Any]:
    """Return a copy of a configuration's rotary settings."""
    found: Any = config.rope_parameters
    return dict(found or {})


def trained_positions(base: LlamaConfig) -> int | None:
    """Return how many positions a base was trained on before its own rotation was stretched, if it was.

    None where its configuration does not say: of linear ones some count ``max_position_embeddings`` before
    the stretching (vicuna-7b-v1.5-16k: 4,096 and a factor of 4), some after it (LLaMA-2-7B-32K: 32,768 and a
    factor of 8). transformers' dynamic counts before, by its formula.
    """
    rope = own_parameters(base)
    if (named := rope.get("original_max_position_embeddings")) is not None:
        return int(named)
    is_counted_before = rope.get("rope_type", "default") in ("default", "dynamic")
    return int(base.max_position_embeddings) if is_counted_before else None


def with_rotation(base: LlamaConfig, rope: FixedRopeParameters | None, num_tokens: int) -> LlamaConfig:
    """Return ``base`` with ``rope`` in place of its own rotary settings; None leaves it as it is.

    Its ``max_position_embeddings`` becomes what the positions reach: ``factor`` times those trained on for
    linear and yarn, which is also how transformers counts, and for the others, which have no such end, the
    longer of the base's and ``num_tokens``, a length that it was trained at.
    """
    if rope is None:
        return base
    longest = max(num_tokens, base.max_position_embeddings)
    original = rope.original_max_position_embeddings or trained_positions(base)
    if rope.rope_type in _INTERPOLATED and original is not None:
        assert isinstance(rope.factor, float)
        longest = max(num_tokens, round(rope.factor * original))
    replaced = {"rope_parameters": rope.to_transformers(), "max_position_embeddings": longest}
    return LlamaConfig.from_dict(base.to_dict() | replaced)


def rotation(config: LlamaConfig) -> torch.Tensor:
    """Return (D / 2 + 1,) fp32: the turn of each pair per position, and what cosine and sine are multiplied
    by."""
    made: Any = LlamaRotaryEmbedding(config)
    return torch.cat([made.inv_freq, torch.tensor([made.attention_scaling])])


def same_rotation(one: LlamaConfig, other: LlamaConfig) -> bool:
    """Return whether both turn every position alike, whatever their settings are called."""
    first, second = rotation(one), rotation(other)
    return first.shape == second.shape and torch.equal(first, second)


def fixed_parameters(config: LlamaConfig) -> FixedRopeParameters | None:
    """Return the rotary settings of ``config`` for an adapter's file; None where no run could have set them,
    so that they must be the base's own."""
    known = FixedRopeParameters.model_fields
    rope = own_parameters(config)
    try:
        return FixedRopeParameters.model_validate(
            {name: value for name, value in rope.items() if name in known and value is not None}
        )
    except ValidationError:
        return None
