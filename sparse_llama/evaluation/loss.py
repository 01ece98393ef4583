"""Mean loss per labelled token, every token weighing the same whatever batch or rank it is in."""

import torch
from torch import nn

from sparse_llama.data.batches import Batch
from sparse_llama.distributed.ranks import all_reduce_sum, device
from sparse_llama.errors import DataError


@torch.no_grad()
def mean_token_loss(objective: nn.Module, batches: list[Batch]) -> float:
    """Return the cross entropy in nats per labelled token, summed in fp64 over all batches and ranks.

    Args:
        objective: ``TokenLoss`` or the engine around it, in evaluation mode.
        batches: this rank's, or its parts of them where ranks share rows; under ZeRO-3 as many as every other
            rank's.

    Raises:
        DataError: no rank has a labelled token.
    """
    # loss and count in one tensor, one message; counts are exact in fp64 up to 2 ** 53
    total = torch.zeros(2, dtype=torch.float64, device=device())
    for batch in batches:
        total[0] += objective(**batch.to(device()))
        total[1] += batch.num_labelled
    loss_sum, num_labelled = all_reduce_sum(total).tolist()
    if num_labelled == 0:
        raise DataError(
            "the data to validate on: no token has a label, so there is no loss; "
            "give records with responses, or rows longer than their prompts"
        )
    return loss_sum / num_labelled
