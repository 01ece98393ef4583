"""How far a run's positions go, settled before anything is read: longer rows than the base was made for are
refused, or stretched as the run says.

The dynamic type is fixed at the run's length. transformers itself turns by the longest position that the
module has seen so far (``dynamic_rope_update``, 5.24), so what a token gets depends on the documents that it
is packed with and on the batches before it, and keys in a cache keep the turns of their time: training,
decoding and an export would be three models. At one length dynamic is the default type with a larger
``rope_theta``, which is what the run computes with and its adapter says.
"""

import math
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from sparse_llama.adapters.interop.ours import head_dim
from sparse_llama.adapters.rotation import own_parameters, same_rotation, trained_positions, with_rotation
from sparse_llama.config.rope import FixedRopeParameters, RopeParameters
from sparse_llama.config.settings import Settings
from sparse_llama.errors import ConfigError

_KEY = "sparse_llama.model.rope_parameters"


@dataclass(frozen=True)
class Positions:
    """The positions of a run."""

    config: LlamaConfig
    """The base's, with what the run changes of it."""
    rope_parameters: FixedRopeParameters | None
    """What the run computes with in place of the base's own rotary settings, every number known; None is the
    base's own."""
    notices: tuple[str, ...] = ()


def run_positions(base: LlamaConfig, settings: Settings) -> Positions:
    """Return the positions of a run of ``settings`` on ``base``.

    What counts is ``seq_length``: a document may be as long as a row, though the positions of packed ones
    start anew with each. Random weights know no positions, so any number of them will do.

    Raises:
        ConfigError: rows are longer than the base was made for and nothing is said about it, or what is said
            does not reach that far or cannot be worked out.
    """
    rope, length, longest = settings.model.rope_parameters, settings.seq_length, base.max_position_embeddings
    if rope is None:
        if length <= longest:
            return Positions(base, None)
        if settings.model.random_weights:
            return Positions(
                LlamaConfig.from_dict(base.to_dict() | {"max_position_embeddings": length}), None
            )
        raise ConfigError(_too_long(settings, longest))
    if rope.factor == "auto" and length <= longest:
        notice = (
            f'{_KEY}: factor "auto" changes nothing up to {longest:,} tokens, which the base was made for'
        )
        return Positions(base, None, (notice,))
    fixed = _fix(rope, base, length)
    config = with_rotation(base, fixed, length)
    if same_rotation(config, base):
        if length <= longest:
            return Positions(base, None, (f"{_KEY}: turns positions as the base does; no effect",))
        return Positions(config, fixed, (_unseen(rope, longest),))
    return Positions(config, fixed, _notices(rope, fixed, base, length))


def describe_positions(rope: FixedRopeParameters | None) -> str:
    """Return rotary settings in a message's words."""
    return "the base's own positions" if rope is None else f"positions by {rope}"


def _too_long(settings: Settings, longest: int) -> str:
    return (
        f"sparse_llama.seq_length: {settings.seq_length} tokens, but {settings.model.path} was made for "
        f"{longest} positions (max_position_embeddings); use at most {longest}, or stretch them with "
        '--rope yarn, in the file "sparse_llama": {"model": {"rope_parameters": {"rope_type": "yarn", '
        '"factor": "auto"}}}'
    )


def _fix(rope: RopeParameters, base: LlamaConfig, length: int) -> FixedRopeParameters:
    """Return ``rope`` with everything filled in that depends on the base and the run."""
    own = own_parameters(base)
    kind, theta = rope.rope_type, rope.rope_theta or float(own.get("rope_theta") or base.default_theta)
    trained = rope.original_max_position_embeddings or trained_positions(base)
    if kind == "default":
        return FixedRopeParameters(rope_type="default", rope_theta=theta)
    if trained is None and (rope.factor == "auto" or kind != "linear"):
        raise ConfigError(_unknown_original(rope, own))
    factor = rope.factor
    if factor == "auto":
        assert trained is not None
        factor = max(length / trained, 1.0)  # below 1 where the document counts more than the base's own
    assert isinstance(factor, float)
    if kind == "dynamic":
        assert trained is not None
        theta = _dynamic_theta(theta, factor, trained, length, head_width=head_dim(base))
        return FixedRopeParameters(rope_type="default", rope_theta=theta)
    if kind != "llama3" and trained is not None:
        _check_reach(factor, trained, length)
    known: dict[str, Any] = {"rope_theta": theta, "factor": factor}
    if kind != "linear":
        known["original_max_position_embeddings"] = trained
    return FixedRopeParameters.model_validate(rope.to_transformers() | known)


def _check_reach(factor: float, trained: int, length: int) -> None:
    reach = round(factor * trained)
    if reach < length:
        least = math.ceil(100 * length / trained) / 100
        raise ConfigError(
            f"{_KEY}.factor: {factor:g} times the {trained} positions that the base was trained on are "
            f'{reach}, fewer than seq_length, {length}; use at least {least:g}, or "auto"'
        )


def _dynamic_theta(theta: float, factor: float, trained: int, length: int, *, head_width: int) -> float:
    """Return the base of the wavelengths that transformers' dynamic type has at ``length`` tokens
    (``_compute_dynamic_ntk_parameters``, 5.24)."""
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return theta * stretch ** (head_width / (head_width - 2))


def _unknown_original(rope: RopeParameters, own: dict[str, Any]) -> str:
    kind, found = rope.rope_type, f"{own.get('rope_type')}, factor {own.get('factor')}"
    message = (
        f"{_KEY}: the base's own positions are stretched already ({found}), and its configuration does not "
        "say from how many; "
    )
    if kind == "linear":
        return message + "give factor as a number, counted from the positions before any stretching"
    if kind == "dynamic":
        return message + "which dynamic starts from; use linear or yarn"
    return message + "give original_max_position_embeddings"


def _notices(
    rope: RopeParameters, fixed: FixedRopeParameters, base: LlamaConfig, length: int
) -> tuple[str, ...]:
    own = own_parameters(base)
    notices: list[str] = []
    if own.get("rope_type", "default") != "default":
        told = ", ".join(f"{name} {value}" for name, value in own.items())
        notices.append(f"{_KEY}: replaces the base's own ({told})")
    original = fixed.original_max_position_embeddings
    if fixed.rope_type == "llama3" and original is not None:
        assert isinstance(fixed.factor, float)
        if (reach := round(fixed.factor * original)) < length:
            notices.append(
                f"{_KEY}: the longest waves are stretched to {reach:,} positions, seq_length is {length:,}; "
                "the base has not seen how they go on (Llama 3.1 was trained so)"
            )
    return tuple(notices)


def _unseen(rope: RopeParameters, longest: int) -> str:
    return (
        f"{_KEY}: {rope.rope_type} leaves the base's rotation as it is; by its config.json the base has seen "
        f"no position beyond {longest:,}"
    )
