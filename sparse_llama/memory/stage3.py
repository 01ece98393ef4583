"""What ZeRO stage 3 does to a model's own code, without an engine: more is saved for the backward pass.

Lines are those of DeepSpeed 0.19.8.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sparse_llama.adapters.norm import AdaptedRMSNorm, forget_norm


@contextmanager
def linear_of_stage3() -> Iterator[None]:
    """Let ``torch.nn.functional.linear`` be what ``memory_efficient_linear`` makes of it, for good, in a
    run's own process (``partition_parameters.py:419``): a function that saves its input, which torch's does
    not do for a frozen weight."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    before = nn.functional.linear
    nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        nn.functional.linear = before


def hand_on_copies(model: nn.Module) -> None:
    """Let no module know that its input is a norm's output: each gets a copy from a hook
    (``parameter_offload.py``, ``_register_deepspeed_module``), so that who needs it again has to save it."""
    for module in model.modules():
        if isinstance(module, AdaptedRMSNorm):
            module.register_forward_hook(_forget)


def _forget(_module: nn.Module, _args: Any, output: Any) -> None:
    forget_norm(output)
