"""The modes that DeepSpeed never had, against their definitions written out and against pictures."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from sparse_llama.config.mask_file import pack_mask
from sparse_llama.config.sparsity import MaskSparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import build_layout

SIZES = [1, 2, 5, 8, 23]


def table_of(num_blocks: int, sees: Any) -> torch.Tensor:
    """Return the (N, N) table of a relation between blocks."""
    return torch.tensor([[bool(sees(i, j)) for j in range(num_blocks)] for i in range(num_blocks)])


def causal_table(layout: Any, head: int = 0) -> torch.Tensor:
    return layout.patterns[layout.head_patterns[head]].to_dense()


@pytest.mark.parametrize("num_blocks", SIZES)
@pytest.mark.parametrize("stride", [1, 2, 3, 7, 30])
def test_strided_sees_a_window_and_every_stride_th_block(stride: int, num_blocks: int):
    block = {"mode": "strided", "stride": stride}
    layout = build_layout(block, num_heads=3, num_blocks=num_blocks)
    expected = table_of(num_blocks, lambda i, j: j <= i and (i - j < stride or (i - j) % stride == 0))
    assert torch.equal(layout.dense(), expected.expand(3, -1, -1))
    assert torch.equal(causal_table(layout), expected)

    both = build_layout(block | {"attention": "bidirectional"}, num_heads=1, num_blocks=num_blocks)
    expected = table_of(num_blocks, lambda i, j: abs(i - j) < stride or (i - j) % stride == 0)
    assert torch.equal(both.dense()[0], expected)
    assert torch.equal(causal_table(both), expected.tril())


@pytest.mark.parametrize("num_blocks", SIZES)
@pytest.mark.parametrize("size", [2, 4, 6, 30])
def test_s2_heads_see_their_group_and_the_later_half_of_them_a_shifted_one(size: int, num_blocks: int):
    block = {"mode": "s2", "group_blocks": size}
    layout = build_layout(block, num_heads=4, num_blocks=num_blocks)
    both = build_layout(block | {"attention": "bidirectional"}, num_heads=4, num_blocks=num_blocks)
    for head in range(4):
        shift = size // 2 if head >= 2 else 0
        expected = table_of(num_blocks, lambda i, j, s=shift: (i + s) // size == (j + s) // size)
        assert torch.equal(both.dense()[head], expected)
        assert torch.equal(layout.dense()[head], expected.tril())
        assert torch.equal(causal_table(layout, head), expected.tril())
        assert torch.equal(causal_table(both, head), expected.tril())


def test_s2_does_not_wrap_around():
    """LongLoRA without flash attention rolls: its first and last half group are one, and see each other."""
    layout = build_layout({"mode": "s2", "group_blocks": 4}, num_heads=2, num_blocks=8)
    rows = ["".join("#" if cell else "." for cell in row) for row in causal_table(layout, head=1).tolist()]
    assert rows == [
        "#.......",
        "##......",
        "..#.....",
        "..##....",
        "..###...",
        "..####..",
        "......#.",
        "......##",
    ]


@pytest.mark.parametrize(
    ("num_heads", "shifted"), [(1, [1]), (2, [0, 1]), (3, [0, 1, 1]), (9, [0] * 4 + [1] * 5)]
)
def test_the_middle_one_of_an_odd_number_of_heads_is_shifted(num_heads: int, shifted: list[int]):
    """As in LongLoRA, which shifts heads ``num_heads // 2`` and up."""
    layout = build_layout({"mode": "s2", "group_blocks": 4}, num_heads=num_heads, num_blocks=8)
    plain = table_of(8, lambda i, j: j <= i and i // 4 == j // 4)
    assert [int(not torch.equal(causal_table(layout, head), plain)) for head in range(num_heads)] == shifted


def save(path: Path, table: Any) -> dict[str, Any]:
    np.save(path, table)
    return {"mode": "mask", "path": str(path)}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("num_blocks", [1, 12, 70])
def test_a_mask_is_attended_as_it_was_drawn(tmp_path: Path, num_blocks: int, order: Literal["C", "F"]):
    rng = np.random.default_rng(num_blocks)
    table = np.asarray(
        (rng.random((num_blocks, num_blocks)) < 0.3) | np.eye(num_blocks, dtype=bool), order=order
    )
    layout = build_layout(save(tmp_path / "mask.npy", table), num_heads=3, num_blocks=num_blocks)
    drawn = torch.tensor(np.ascontiguousarray(table))
    assert torch.equal(layout.dense(), drawn.expand(3, -1, -1))
    assert torch.equal(causal_table(layout), drawn.tril())
    assert len(layout.patterns) == 1


def test_a_packed_mask_makes_the_same_layout_when_its_file_is_gone(tmp_path: Path):
    tables = (np.random.default_rng(3).random((2, 13, 13)) < 0.4) | np.eye(13, dtype=bool)
    packed = pack_mask(MaskSparsity(path=save(tmp_path / "mask.npy", tables)["path"]))
    (tmp_path / "mask.npy").unlink()
    layout = build_layout(packed.model_dump(mode="json"), num_heads=2, num_blocks=13)
    assert torch.equal(layout.dense(), torch.tensor(tables))


def test_heads_with_the_same_mask_share_a_pattern(tmp_path: Path):
    rng = np.random.default_rng(1)
    one, other = (rng.random((2, 9, 9)) < 0.4) | np.eye(9, dtype=bool)
    layout = build_layout(save(tmp_path / "mask.npy", np.stack([one, other, one])), num_heads=3, num_blocks=9)
    assert layout.head_patterns == (0, 1, 0)
    assert torch.equal(layout.dense(), torch.tensor(np.stack([one, other, one])))


def test_a_large_mask_is_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = (np.random.default_rng(2).random((40, 40)) < 0.4) | np.eye(40, dtype=bool)
    monkeypatch.setattr("sparse_llama.layouts.mask._CELLS_AT_ONCE", 40 * 7)
    layout = build_layout(save(tmp_path / "mask.npy", table), num_heads=1, num_blocks=40)
    assert torch.equal(layout.dense()[0], torch.tensor(table))


def test_a_mask_for_a_longer_master_is_cropped(tmp_path: Path):
    block = save(tmp_path / "mask.npy", np.tri(9, dtype=bool))
    assert torch.equal(
        build_layout(block, num_heads=1, num_blocks=5).dense()[0], torch.ones(5, 5).tril().bool()
    )


def test_mistakes_in_a_mask_are_one_line(tmp_path: Path):
    path = tmp_path / "mask.npy"
    table = np.tri(8, dtype=bool)
    table[5, 5] = False
    where = f'sparse_attention.path: "{path}": '
    for made, heads, message in (
        (
            table,
            2,
            "block 5 of head 0 does not see itself; set the diagonal, for a token sees at least itself",
        ),
        (np.stack([np.tri(8, dtype=bool), table]), 2, "block 5 of head 1 does not see itself; "),
        (np.ones((3, 8, 8), bool), 2, "made for 3 heads, the model has 2; save a table for each, or one of "),
    ):
        with pytest.raises(ConfigError) as refused:
            build_layout(save(path, made), num_heads=heads, num_blocks=8)
        assert str(refused.value).startswith(where + message)


def test_a_layout_has_heads_and_blocks():
    with pytest.raises(ConfigError, match="build_layout: num_heads must be >= 1, got 0"):
        build_layout({"mode": "dense"}, 0, 4)
    with pytest.raises(ConfigError, match="build_layout: num_blocks must be >= 1, got -1"):
        build_layout({"mode": "dense"}, 4, -1)
