"""Ranks that share each row among them: the groups of sequence parallelism, and what they send each other.

Of W processes every R consecutive ones are a group: rank r holds the tokens [r T / R, (r + 1) T / R) of its
group's rows, and the W / R groups hold different rows. Launchers number the processes host by host, so a
group lies on one host where the GPUs of a host are a multiple of R.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from sparse_llama.distributed.dataless import holds_data
from sparse_llama.distributed.ranks import rank


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """This rank's group, in which every collective is called by all ranks in the same order."""

    size: int
    """R, the ranks that share a row."""
    rank: int
    """Which part of the row is this process', from 0."""
    group: dist.ProcessGroup | None = None
    """None is a plan's: its tensors have sizes and no content, and nothing is sent."""

    def exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return (R, ...) of which part i is what rank i has at this rank's place of its ``tensor``, (R, ...)
        too."""
        assert tensor.shape[0] == self.size
        sent = tensor.contiguous()
        received = torch.empty_like(sent)
        if self.group is None:
            assert not holds_data(sent), "only a plan exchanges nothing"
        else:
            dist.all_to_all_single(received, sent, group=self.group)
        return received

    def gather_tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the ranks' (B, T / R) tensors side by side, (B, T)."""
        sent = tensor.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        if self.group is None:
            assert not holds_data(sent), "only a plan gathers nothing"
        else:
            dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts, dim=1)


def join_sequence_group(size: int) -> SequenceParallel | None:
    """Return this rank's group of ``size`` ranks, None for 1; every process of the job must call it."""
    if size == 1:
        return None
    group, _ = dist.new_subgroups(group_size=size)
    assert isinstance(group, dist.ProcessGroup), "every process is in a group"
    return SequenceParallel(size, rank() % size, group)
