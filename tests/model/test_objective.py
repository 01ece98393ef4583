"""The loss: which tokens count, that it is a sum, and what happens when none do."""

import pytest
import torch
import torch.nn.functional as F
from adapted_models import adapt, shifted, tokens
from oracles.adapter_formula import adapted_logits, token_loss

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.model.objective import TokenLoss

POSITIONS = torch.arange(9).expand(2, 9)


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, :] = -100
    labels[1, 3] = ids[1, 3]
    return labels


def test_the_loss_is_the_sum_over_labelled_next_tokens(tiny_llama):
    """T9: labels are shifted once, and -100 is what is ignored."""
    model = adapt(tiny_llama(), "v2")
    ids = tokens()
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    expected = token_loss(adapted_logits(weights, model.config, ids), labels_of(ids))
    loss = TokenLoss(model)(ids, POSITIONS, shifted(labels_of(ids)))
    assert loss.dim() == 0
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_is_transformers_mean_times_the_count(tiny_llama):
    model = adapt(tiny_llama(), "v1")
    ids = tokens()
    labels = labels_of(ids)
    mean = model(input_ids=ids, labels=labels).loss
    assert TokenLoss(model)(ids, POSITIONS, shifted(labels)).item() == pytest.approx(
        mean.item() * 5, rel=1e-6
    )


def test_the_first_tokens_label_is_never_predicted(tiny_llama):
    model = adapt(tiny_llama(), "v1")
    ids = tokens()
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 1
    assert TokenLoss(model)(ids, POSITIONS, shifted(labels)).item() == 0.0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_without_a_labelled_token_the_loss_is_zero_with_zero_gradients(tiny_llama, version):
    """T10, memory trap 11: a prompt longer than the row must not make NaN of everything."""
    model = adapt(tiny_llama(), version)
    loss = TokenLoss(model)(tokens(), POSITIONS, torch.full((2, 9), -100))
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in trainable_parameters(model):
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_packed_documents_have_the_loss_of_the_documents_alone(tiny_llama):
    model = adapt(tiny_llama(), "v1")
    ids = tokens(num_rows=1)
    labels = ids.clone()
    labels[0, 4] = -100  # the second document's first token
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    loss = TokenLoss(model)
    alone = loss(ids[:, :4], positions[:, :4], shifted(labels[:, :4])) + loss(
        ids[:, 4:], positions[:, 4:], shifted(labels[:, 4:])
    )
    assert loss(ids, positions, shifted(labels)).item() == pytest.approx(alone.item(), rel=1e-6)


def test_only_labelled_rows_go_through_the_head(tiny_llama):
    """At V = 32,000 every needless row of logits costs 384,000 bytes."""
    model = adapt(tiny_llama(), "v1")
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    TokenLoss(model)(tokens(), POSITIONS, shifted(labels_of(tokens())))
    assert rows == [5]


def test_in_bf16_the_cross_entropy_is_computed_in_fp32(tiny_llama):
    model = adapt(tiny_llama(), "v1").bfloat16()
    ids = tokens()
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=POSITIONS).logits[:, :-1].float()
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert TokenLoss(model)(ids, POSITIONS, shifted(ids)).item() == pytest.approx(expected.item(), rel=1e-6)
