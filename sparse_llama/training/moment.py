"""Where a run is, noted as it goes: two assignments a micro-batch, read only when memory has run out."""

from dataclasses import dataclass

from sparse_llama.data.batches import Batch

FORWARD, BACKWARD, UPDATE = "forward pass", "backward pass", "optimizer"


@dataclass
class Moment:
    """What a run is doing."""

    phase: str = "start"
    step: int = 0
    """The optimizer step that is being made, or was made last; 0 before the first."""
    batch: Batch | None = None
    """The micro-batch that is being worked on."""

    def enter(self, phase: str, batch: Batch | None = None) -> None:
        """Note what begins."""
        self.phase, self.batch = phase, batch
