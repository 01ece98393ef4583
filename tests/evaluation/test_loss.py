"""The mean loss of batches: each labelled token weighs the same."""

import pytest
import torch
import torch.nn.functional as F
from adapted_models import adapt, shifted, tokens
from oracles.adapter_formula import adapted_logits, token_loss

from sparse_llama.data.batches import Batch
from sparse_llama.errors import DataError
from sparse_llama.evaluation.loss import mean_token_loss
from sparse_llama.model.objective import TokenLoss

POSITIONS = torch.arange(9).expand(2, 9)


def batches(firsts: list[int]) -> list[Batch]:
    """Return batches labelled from these tokens on: 18 - 2 x first labels each."""
    ids = tokens(num_rows=2 * len(firsts)).split(2)
    return [
        Batch(rows, POSITIONS, shifted(rows.masked_fill(torch.arange(9) < first, -100)))
        for rows, first in zip(ids, firsts, strict=True)
    ]


def labels_of(batch: Batch) -> torch.Tensor:
    """Return the labels before they were shifted."""
    return F.pad(batch.shift_labels[:, :-1], (1, 0), value=-100)


def test_it_is_the_sum_over_all_labelled_tokens_over_their_number(tiny_llama):
    """The mean over batches would weigh a token of the second one seven times as much."""
    model = adapt(tiny_llama(), "v2")
    uneven = batches([1, 8, 9])
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    expected = sum(
        float(token_loss(adapted_logits(weights, model.config, batch.input_ids), labels_of(batch)))
        for batch in uneven
    )
    assert mean_token_loss(TokenLoss(model), uneven) == pytest.approx(expected / 18, rel=1e-5)


def test_it_leaves_no_graph_behind(tiny_llama):
    model = adapt(tiny_llama(), "v1")
    seen: list[bool] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    mean_token_loss(TokenLoss(model), batches([1]))
    assert seen == [False]


def test_nothing_labelled_is_refused(tiny_llama):
    with pytest.raises(DataError, match="no token has a label"):
        mean_token_loss(TokenLoss(tiny_llama()), batches([9]))
