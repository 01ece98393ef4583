"""A fast wrong answer is no result: rows of what is timed, computed again in fp64 from the definition."""

import torch

from sparse_llama.attention.core import expand_heads
from sparse_llama.attention.mask import rows_mask
from sparse_llama.benchmark.contenders import Inputs
from sparse_llama.benchmark.timing import Contender
from sparse_llama.layouts import Layout

_NUM_ROWS = 8
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative error of a row. Dense flash has 6e-7, 4e-3 and 5e-4 (4,096 tokens, CPU); a wrong key in a hundred
would be 0.1."""


def worst_error(contender: Contender, layout: Layout, inputs: Inputs) -> float:
    """Return the largest relative error of some rows' outputs, and of their queries' gradients.

    Rows are spread over the sequence, the last token among them; a row costs T x D, whatever the layout.

    Raises:
        AssertionError: the error is larger than rounding explains.
    """
    num_heads, num_tokens = inputs.query.shape[1:3]
    output = contender.forward()
    grad_query = None if contender.backward is None else _first(contender.backward(output))
    worst = 0.0
    for index in range(1, _NUM_ROWS + 1):
        row = num_tokens * index // _NUM_ROWS - 1
        mask = rows_mask(layout, num_heads, row, row + 1).to(inputs.query.device)  # (H, 1, row + 1)
        wanted, wanted_grad = _row(inputs, row, mask)
        worst = max(worst, _relative(output[:, :, row], wanted))
        if grad_query is not None:
            worst = max(worst, _relative(grad_query[:, :, row], wanted_grad))
    allowed = ALLOWED[inputs.query.dtype]
    assert worst <= allowed, f"{contender.name}: a relative error of {worst:.1e}, more than {allowed:.0e}"
    return worst


def _row(inputs: Inputs, row: int, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and query gradient (1, H, D) of one token, by autograd in fp64."""
    query = inputs.query[:, :, row : row + 1].detach().double().requires_grad_()
    key, value = (
        expand_heads(tensor.detach()[:, :, : row + 1], query.shape[1]).double()
        for tensor in (inputs.key, inputs.value)
    )
    scores = (inputs.scaling * query @ key.mT).masked_fill(~mask, -torch.inf)
    output = scores.softmax(-1) @ value
    (grad,) = torch.autograd.grad(output, query, inputs.grad[:, :, row : row + 1].double())
    return output[:, :, 0].detach(), grad[:, :, 0]


def _relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative L2 distance; of a gradient of 0 (a token that sees itself alone), the distance."""
    distance, size = (actual.detach().double() - wanted).norm(), wanted.norm()
    return float(distance if size == 0 else distance / size)


def _first(grads: object) -> torch.Tensor:
    assert isinstance(grads, tuple)
    return grads[0]
