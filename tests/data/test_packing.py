"""A packed row trains like its documents one by one, and holds all of them."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

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
