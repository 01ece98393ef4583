"""ZeRO-3 and modules that compute with other modules' parameters.

DeepSpeed gathers a module's partitioned parameters around that module's forward and backward pass. A module
that computes with those of its children in a node of its own, without calling them, has to be given them too.
"""

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Borrows(Protocol):
    """A module that computes with parameters which are not its own."""

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Return them."""
        ...


def gather_borrowed(model: nn.Module) -> None:
    """Make ZeRO-3 gather around each module of ``model`` the parameters that it borrows; call it once
    DeepSpeed has partitioned them. Other stages and plain torch are left as they are.

    DeepSpeed finds such parameters by itself at their first use, but only within a forward pass of its
    engine: too late for the logits that are looked at before the first step.
    """
    for module in model.modules():
        if not isinstance(module, Borrows):
            continue
        partitioned = [one for one in module.borrowed_parameters() if hasattr(one, "ds_id")]
        if partitioned:
            # only where DeepSpeed is loaded anyway: it takes seconds
            from deepspeed.runtime.zero import register_external_parameter

            for parameter in partitioned:
                register_external_parameter(module, parameter)
