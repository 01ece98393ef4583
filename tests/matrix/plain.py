"""What every cell is compared with: each document alone, in fp64, in plain torch.

No DeepSpeed, no row, no padding, no lever; and since all weights of this model have gradients, none of the
project's own backward passes but the attention's, by the mask's formula.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from adapted_models import shake, trainable_state
from grouped_models import with_wide_norms

from sparse_llama.adapters.attach import attach_adapters, trainable_parameters
from sparse_llama.attention.interface import attach_attention, plan_attention
from sparse_llama.config.layers import LayerSparsities
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.data.packing import IGNORED, Document
from sparse_llama.model.llama import load_llama

BASE: dict[str, Any] = {
    "num_hidden_layers": 5,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
"""Attention far from uniform, but not as far as elsewhere in the tests: at 0.3 gradients of gates are small
differences, and 2e-5 off in fp32."""
SEQ_LENGTH = 96
SEED = 42
ADAPTERS: dict[str, dict[str, Any]] = {
    "v1": {"version": "v1", "prompt_length": 3, "start_layer": 1},
    "v2": {"version": "v2", "prompt_length": 3, "start_layer": 1},
    "v2 on top": {"version": "v2", "prompt_length": 3, "top_layers": 3},
}
"""The lowest trained of 5 layers is 1, 0 and 2, so that two checkpoints are of 2, 3 and 2 layers each, and of
those left over."""
SPARSITIES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "sparse": {
        "mode": "fixed",
        "block": 16,
        "num_local_blocks": 2,
        "num_global_blocks": 1,
        "attention": "unidirectional",
        "different_layout_per_head": True,
        "num_different_global_patterns": 2,
    },
}


def documents_by_row() -> list[list[Document]]:
    """Return the documents of a step's four rows: of several, of one without labels, of unequal prompts."""
    generator = torch.Generator().manual_seed(11)

    def draw(length: int, prompt_length: int) -> Document:
        ids = torch.randint(61, (length,), generator=generator).tolist()
        return Document(ids, [IGNORED] * prompt_length + ids[prompt_length:])

    return [
        [draw(70, 50), draw(15, 4)],
        [draw(53, 53)],
        [draw(89, 71)],
        [draw(20, 1), draw(11, 6), draw(43, 10)],
    ]


def plain_step(folder: Path, adapter: str, attention: str) -> dict[str, Any]:
    """Return the tensors that a step starts from (fp32), the loss summed over its tokens, their number, and
    the gradients of the mean loss (fp64), by the names of what trains."""
    model = load_llama(str(folder), dtype=torch.float32).model
    block = SPARSITIES[attention]
    sparsity = None if block is None else parse_sparsity(block)
    plan = plan_attention(
        LayerSparsities(sparsity, (), None).resolve(BASE["num_hidden_layers"]),
        num_heads=model.config.num_attention_heads,
        master_length=SEQ_LENGTH,
        seed=SEED,
        backend="reference",
    )
    assert plan.is_sparse_at(43) == (attention == "sparse")
    attach_attention(model, plan)
    attach_adapters(model, AdapterSettings(**ADAPTERS[adapter]), seed=SEED)
    state = trainable_state(shake(model, 0.1))
    trained = dict(trainable_parameters(model))
    with_wide_norms(model.double()).requires_grad_(True).train()
    loss_sum, num_labelled = torch.zeros((), dtype=torch.float64), 0
    for document in (one for row in documents_by_row() for one in row):
        labels = torch.tensor(document.labels[1:])
        logits = model(input_ids=torch.tensor([document.ids]), use_cache=False).logits[0, :-1]
        loss_sum = loss_sum + F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        num_labelled += int((labels != IGNORED).sum())
    (loss_sum / num_labelled).backward()
    gradients = {name: _gradient(parameter) for name, parameter in trained.items()}
    return {
        "state": state,
        "loss_sum": loss_sum.item(),
        "num_labelled": num_labelled,
        "gradients": gradients,
    }


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    assert float(parameter.grad.norm()) > 1e-4, "next to nothing to compare"
    return parameter.grad
