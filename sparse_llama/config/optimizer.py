"""The ``optimizer`` block: the optimizers that work over an adapter, with the parameters that every build of
them takes."""

from typing import Annotated, Any

from pydantic import Field

from sparse_llama.config.section import FrozenList, Section, only, quote, suggest
from sparse_llama.errors import ConfigError

DEFAULT_LR = 1e-3
"""Trains adapters of both versions. LLaMA-Adapter's 9e-3 is a *base* rate, to be multiplied by batch /
256."""
_Beta = Annotated[float, Field(ge=0, lt=1)]
_Betas = Annotated[tuple[_Beta, _Beta], FrozenList]


class _Optimizer(Section):
    lr: float = Field(default=DEFAULT_LR, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """Applied to the prompts only: decay would pull a scale from 1 to 0."""


class Adam(_Optimizer):
    """Adam; like DeepSpeed's with decoupled weight decay unless ``adam_w_mode`` is false."""

    betas: _Betas = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    torch_adam: bool = False
    """torch's own instead of DeepSpeed's fused one, which a compiler builds at first use."""
    adam_w_mode: bool = True
    bias_correction: Annotated[bool, only(True, "torch's AdamW always corrects")] = True
    amsgrad: Annotated[bool, only(False, "DeepSpeed's Adam has no such variant")] = False
    fp32_optimizer_states: Annotated[bool, only(True, "an adapter's moments are kept in fp32")] = True


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    adam_w_mode: Annotated[bool, only(True, 'AdamW is Adam with it; for L2 decay use "type": "Adam"')] = True


class Lion(_Optimizer):
    """Lion (arXiv:2302.06675); the second beta is DeepSpeed's default, the paper's is 0.99."""

    betas: _Betas = (0.9, 0.999)


class Adagrad(_Optimizer):
    """Adagrad."""

    eps: float = Field(default=1e-10, gt=0)


class SGD(_Optimizer):
    """torch's SGD."""

    momentum: float = Field(default=0.0, ge=0, lt=1)
    dampening: float = Field(default=0.0, ge=0, le=1)
    nesterov: bool = False


class Optimizer(Section):
    """The ``optimizer`` block."""

    type: str
    params: dict[str, object] = {}
    legacy_fusion: Annotated[bool, only(False, "it is for Apex' fused Adam")] = False


OPTIMIZERS: dict[str, type[_Optimizer]] = {cls.__name__: cls for cls in (AdamW, Adam, Lion, Adagrad, SGD)}
OFFLOADABLE = ("AdamW", "Adam", "Lion", "Adagrad")
"""Those that DeepSpeed has for the CPU."""
ZERO_TESTED = OFFLOADABLE
"""Those that ZeRO takes without ``zero_allow_untested_optimizer``."""
# Keys that are the default when allowed at all: not passed on, since not every build of the optimizer takes
# them.
_IMPLIED = ("bias_correction", "amsgrad", "fp32_optimizer_states")


def default_optimizer() -> dict[str, Any]:
    """Return the ``optimizer`` block of a document that has none."""
    return {"type": "AdamW", "params": {"lr": DEFAULT_LR, "betas": [0.9, 0.999], "weight_decay": 0.02}}


def parse_optimizer(block: object) -> dict[str, Any]:
    """Return a checked ``optimizer`` block with the type as DeepSpeed's documents spell it and ``lr`` filled
    in.

    Raises:
        ConfigError: an unknown type or parameter, or a value out of range.
    """
    optimizer = Optimizer.parse(block, "optimizer")
    names = {name.lower(): name for name in OPTIMIZERS}
    if optimizer.type.lower() not in names:
        allowed = f"; allowed: {', '.join(OPTIMIZERS)}"
        hint = suggest(optimizer.type, OPTIMIZERS)
        raise ConfigError(
            "optimizer.type: no optimizer here is called "
            f"{quote(optimizer.type)}{hint if 'did you mean' in hint else allowed}"
        )
    name = names[optimizer.type.lower()]
    params = OPTIMIZERS[name].parse(optimizer.params, "optimizer.params")
    if isinstance(params, SGD) and params.nesterov and (params.momentum == 0 or params.dampening != 0):
        raise ConfigError("optimizer.params.nesterov: needs momentum > 0 and dampening 0")
    given = {key: value for key, value in optimizer.params.items() if key not in _IMPLIED}
    return {"type": name, "params": {"lr": params.lr} | given}
