"""FlexAttention's masks, made from intervals, against PyTorch's own way of making them; no GPU needed."""

import pytest
import torch
from attention.test_cores import MODES, ROWS, SCALING, TOKENS, draw, make_layout
from oracles.masked_attention import attend, batch_table, relative_error
from torch.nn.attention.flex_attention import create_block_mask

from sparse_llama.attention.documents import find_documents
from sparse_llama.attention.flex import TILE, FlexCore, block_mask, mask_mod

SPARSE = [mode for mode in MODES if mode not in ("full", "dense")]
CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("block", [16, 32, 48, 128])
@pytest.mark.parametrize("mode", SPARSE)
def test_the_token_function_is_the_table(mode: str, block: int, rows: str):
    layout = make_layout(mode, block)
    assert layout is not None
    attends = mask_mod(layout, find_documents(ROWS[rows], 2), CPU)
    grid = torch.meshgrid(*(torch.arange(size) for size in (2, 4, TOKENS, TOKENS)), indexing="ij")
    assert torch.equal(attends(*grid), batch_table(layout, 4, ROWS[rows]))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("block", [16, 32, 48, 128])
@pytest.mark.parametrize("mode", SPARSE)
def test_the_tiles_are_those_that_visiting_all_pairs_finds(mode: str, block: int, rows: str):
    layout = make_layout(mode, block)
    assert layout is not None
    ours = block_mask(layout, find_documents(ROWS[rows], 2), CPU)
    theirs = create_block_mask(ours.mask_mod, 2, 4, TOKENS, TOKENS, device="cpu", BLOCK_SIZE=TILE)
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(ours, f"{name}_{what}") for what in ("num_blocks", "indices"))
        wanted_counts, wanted = (getattr(theirs, f"{name}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(counts.expand_as(wanted_counts), wanted_counts), name
        is_used = torch.arange(indices.shape[-1]) < wanted_counts[..., None]
        assert torch.equal(
            indices.expand(*wanted.shape[:-1], -1)[is_used], wanted[..., : indices.shape[-1]][is_used]
        ), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("mode", SPARSE)
def test_the_eager_forward_pass_is_the_definition(mode: str, num_kv_heads: int):
    layout, positions = make_layout(mode), ROWS["packed"]
    assert layout is not None
    query, key, value, _ = draw(num_kv_heads)
    core = FlexCore(block_mask(layout, find_documents(positions, 2), CPU), SCALING, is_compiled=False)
    expected = attend(query, key, value, batch_table(layout, 4, positions), SCALING)
    assert relative_error(core.forward(query, key, value)[0], expected) < 1e-13
