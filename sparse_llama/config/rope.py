"""How a run turns positions beyond those that its base was trained on: transformers' ``rope_parameters``,
checked by type.

transformers (5.24, ``modeling_rope_utils.py``) warns of a key that a type has no use for, and of a factor
below 1, and computes; here both end the run.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from sparse_llama.config.section import Section, either, show

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]
_YARN = (
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
_KEYS: dict[RopeType, tuple[str, ...]] = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "dynamic": ("rope_theta", "factor"),
    "yarn": ("rope_theta", "factor", *_YARN),
    "llama3": (
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
}
_NEEDED: dict[RopeType, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_FACTOR = 'a number >= 1 or "auto"'

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RopeParameters(Section):
    """The rotation of queries and keys by position, in transformers' own keys; whatever is left out that the
    base's configuration has, such as ``rope_theta``, is the base's."""

    rope_type: RopeType
    """linear, dynamic, yarn or llama3 stretch the base's rotation, each in its way; default turns by
    ``rope_theta`` alone."""

    factor: Annotated[
        Literal["auto"] | Annotated[float, Field(ge=1, allow_inf_nan=False)] | None, either(_FACTOR)
    ] = None
    """How many times longer than the base was trained on; "auto" is ``seq_length`` by that length."""

    rope_theta: _Positive | None = None
    """Base of the wavelengths; null is the model's own."""

    original_max_position_embeddings: int | None = Field(default=None, ge=1)
    """yarn, llama3: positions that the model was trained on before any stretching; null is what its
    configuration says."""

    attention_factor: _Positive | None = None
    """yarn: what cosine and sine are multiplied by; null is 0.1 ln(factor) + 1."""

    beta_fast: _Positive | None = None
    """yarn: waves of more turns than this in the original positions are kept as they are; null is 32."""

    beta_slow: _Positive | None = None
    """yarn: waves of fewer turns than this are stretched by the whole factor; null is 1."""

    mscale: _Positive | None = None
    """yarn: with ``mscale_all_dim``, another way to say ``attention_factor``."""

    mscale_all_dim: _Positive | None = None
    """yarn: the divisor's; see ``mscale``."""

    truncate: bool | None = None
    """yarn: whether the bounds between kept and stretched waves are whole numbers; null is true."""

    low_freq_factor: _Positive | None = None
    """llama3: waves of fewer turns than this in the original positions are stretched; Llama 3.1 has 1."""

    high_freq_factor: _Positive | None = None
    """llama3: waves of more turns than this are kept as they are; Llama 3.1 has 4."""

    @model_validator(mode="after")
    def _has_the_keys_of_its_type(self) -> Self:
        kind, known = self.rope_type, _KEYS[self.rope_type]
        for name in self.model_fields_set - {"rope_type", *known}:
            if getattr(self, name) is not None:
                owners = " or ".join(owner for owner, keys in _KEYS.items() if name in keys)
                raise ValueError(
                    f"{name} is a key of rope_type {owners}, this is {kind}; keys of {kind}: "
                    f"{', '.join(known)}"
                )
        for name in _NEEDED[kind]:
            if getattr(self, name) is None:
                wanted = _FACTOR if name == "factor" else "a number"
                raise ValueError(f"rope_type {kind} needs {name}, {wanted}")
        self._check_order("beta_slow", 1.0, "beta_fast", 32.0)
        self._check_order("low_freq_factor", None, "high_freq_factor", None)
        self._check_attention()
        return self

    def to_transformers(self) -> dict[str, Any]:
        """Return the table that a ``config.json`` holds; nothing that is not given is in it."""
        return self.model_dump(mode="json")

    def __str__(self) -> str:
        told = {name: value for name, value in self.to_transformers().items() if name != "rope_type"}
        return ", ".join([self.rope_type, *(f"{name} {show(value)}" for name, value in told.items())])

    @model_serializer(mode="wrap")
    def _without_null(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # transformers takes a null beta for its default, but a null factor for a mistake
        return {name: value for name, value in handler(self).items() if value is not None}

    def _check_order(
        self, lower: str, lower_default: float | None, upper: str, upper_default: float | None
    ) -> None:
        low = getattr(self, lower) or lower_default
        high = getattr(self, upper) or upper_default
        if low is not None and high is not None and low >= high:
            raise ValueError(f"{upper} must be above {lower}, got {high:g} and {low:g}")

    def _check_attention(self) -> None:
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim act together; give both or neither")
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError("mscale has no effect beside attention_factor; keep one of them")


class FixedRopeParameters(RopeParameters):
    """``rope_parameters`` that depend on no run any more: what an adapter's file says that it was trained
    with."""

    @model_validator(mode="after")
    def _is_fixed(self) -> Self:
        if self.factor == "auto":
            raise ValueError('factor must be a number here, got "auto"')
        if self.rope_type == "dynamic":
            raise ValueError('rope_type "dynamic" turns by the length of a run; write its "default" instead')
        return self
