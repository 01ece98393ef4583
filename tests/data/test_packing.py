"""A packed row trains like its documents one by one, and holds all of them."""

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from sparse_llama.attention.interface import AttentionPlan, attach_attention, plan_attention
from sparse_llama.config.layers import LayerSparsities
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.data.batches import collate
from sparse_llama.data.packing import Document, Row, one_per_row, pack

IGNORED = -100


def draw_documents(count: int, longest: int, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)
    documents = []
    for _ in range(count):
        ids = [rng.randrange(1, 61) for _ in range(rng.randint(2, longest))]
        cut = rng.randint(1, len(ids) - 1)
        documents.append(Document(ids, [IGNORED] * cut + ids[cut:]))
    return documents


def unpack(rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels from each position 0 to the next."""
    pieces = []
    for row in rows:
        ids, positions, labels = row.ids.tolist(), row.positions.tolist(), row.labels.tolist()
        starts = [t for t, position in enumerate(positions) if position == 0] + [len(ids)]
        for first, last in itertools.pairwise(starts):
            assert positions[first:last] == list(range(last - first))
            pieces.append((ids[first:last], labels[first:last]))
    return pieces


@pytest.mark.parametrize("align", [1, 4, 16])
def test_every_document_is_whole_and_starts_at_a_multiple_of_the_block(align: int):
    documents = draw_documents(200, 48)
    rows = pack(documents, row_length=64, align=align, seed=1)
    assert all(len(row.ids) == len(row.positions) == len(row.labels) == len(row) == 64 for row in rows)
    for row in rows:
        assert all(t % align == 0 for t, position in enumerate(row.positions) if position == 0)
    found = []
    for ids, labels in unpack(rows):
        last = max(t for t, label in enumerate(labels) if label != IGNORED) + 1  # documents end in a label
        found.append((ids[:last], labels[:last]))
        assert set(labels[last:]) <= {IGNORED}
    assert sorted(found) == sorted((one.ids, one.labels) for one in documents)


def test_rows_are_well_filled_and_the_same_for_the_same_seed():
    documents = draw_documents(500, 40)
    rows = pack(documents, row_length=128, align=1, seed=3)
    fewest = -(-sum(len(one.ids) for one in documents) // 128)
    assert len(rows) <= 1.05 * fewest
    assert unpack(pack(documents, row_length=128, align=1, seed=3)) == unpack(rows)
    assert unpack(pack(documents, row_length=128, align=1, seed=4)) != unpack(rows)


def losses(model: LlamaForCausalLM, row: Row) -> torch.Tensor:
    """Return the loss of every labelled token, under a mask written out from the positions."""
    batch = collate([row])
    document = (batch.position_ids == 0).cumsum(1)
    mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
    logits = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
    ).logits
    per_token = F.cross_entropy(logits[0], batch.shift_labels[0], reduction="none")
    return per_token[batch.shift_labels[0] != IGNORED]


@pytest.mark.parametrize("align", [1, 8])
def test_a_packed_row_has_the_losses_and_gradients_of_its_documents_one_by_one(tiny_llama, align: int):
    model = tiny_llama().double()
    model.set_attn_implementation("sdpa")
    documents = draw_documents(12, 20)
    together = torch.cat([losses(model, row) for row in pack(documents, row_length=64, align=align, seed=0)])
    apart = torch.cat([losses(model, row) for row in one_per_row(documents)])
    torch.testing.assert_close(together.sort().values, apart.sort().values, rtol=0, atol=1e-12)
    weight = model.model.layers[0].self_attn.k_proj.weight
    grads = [torch.autograd.grad(each.sum(), weight)[0] for each in (together, apart)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


SPARSE: dict[str, dict[str, Any]] = {
    "fixed": {"num_local_blocks": 2, "different_layout_per_head": True, "num_different_global_patterns": 2},
    "variable": {"local_window_blocks": [1, 2], "global_block_indices": [0]},
    "bigbird": {"num_random_blocks": 1, "num_sliding_window_blocks": 1, "num_global_blocks": 1},
    "bslongformer": {"num_sliding_window_blocks": 1, "global_block_indices": [0]},
    "local_sliding_window": {"num_sliding_window_blocks": 3},
    "strided": {"stride": 3},
    "s2": {"group_blocks": 2},
}


@pytest.mark.parametrize("mode", SPARSE)
def test_rows_packed_by_the_block_of_a_layout_are_exact_for_it(tiny_llama, mode: str):
    """Documents of up to eight blocks, of which each layout leaves some out."""
    block = {"mode": mode, "block": 4, "attention": "unidirectional"} | SPARSE[mode]
    if mode in ("local_sliding_window", "strided", "s2"):
        block.pop("attention")
    layouts = LayerSparsities(parse_sparsity(block))
    model = tiny_llama().double()
    plan = plan_attention(layouts.resolve(4), num_heads=4, master_length=64, seed=0)
    attach_attention(model, plan)
    documents = draw_documents(12, 32)

    def losses_of(rows: list[Row]) -> torch.Tensor:
        found = []
        for batch in (collate([row]) for row in rows):
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
            per_token = F.cross_entropy(logits[0], batch.shift_labels[0], reduction="none")
            found.append(per_token[batch.shift_labels[0] != IGNORED])
        return torch.cat(found).sort().values

    assert layouts.align == 4
    with torch.no_grad():
        together = losses_of(pack(documents, row_length=64, align=layouts.align, seed=0))
        apart = losses_of(one_per_row(documents))
        attach_attention(model, AttentionPlan((None,) * 4))
        dense = losses_of(one_per_row(documents))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)  # transformers' norms are fp32
    assert (dense - apart).abs().max() > 1e-3, "a layout that leaves nothing out proves nothing"
