"""Where a run is, noted as it goes: a few assignments a micro-batch, read only when something is wrong."""

from dataclasses import dataclass, field

import torch

from sparse_llama.data.batches import Batch

FORWARD, BACKWARD, UPDATE = "forward pass", "backward pass", "optimizer"
VALIDATION, SAVING, FINISHING = "validation", "saving a checkpoint", "writing the results"


@dataclass
class Moment:
    """What a run is doing."""

    phase: str = "start"
    step: int = 0
    """The optimizer step that is being made, or was made last; 0 before the first."""
    batch: Batch | None = None
    """The micro-batch that is being worked on."""
    losses: list[torch.Tensor] = field(default_factory=list)
    """Of the micro-batches of the step, in nats, each summed over its labelled tokens."""

    def enter(self, phase: str, batch: Batch | None = None) -> None:
        """Note what begins."""
        self.phase, self.batch = phase, batch
