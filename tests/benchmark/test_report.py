"""Results as people read them, from measurements that are made up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_llama.benchmark.attention import FULL, Dense, Group, Measured, Sizes, compare
from sparse_llama.benchmark.efficiency import PASSES
from sparse_llama.benchmark.provenance import Provenance
from sparse_llama.benchmark.report import (
    HEADER,
    PASS_HEADER,
    attention_panels,
    group_rows,
    markdown_table,
    pass_rows,
    save_attention,
    subject,
)
from sparse_llama.benchmark.timing import Times, Timing

SIZES = Sizes(
    layouts=("fixed",),
    lengths=(4096, 8192),
    blocks=(16, 64),
    backends=("blockwise", "flex"),
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    dtype=torch.float32,
    repeats=5,
)
ORIGIN = Provenance(
    "2026-01-02 03:04 UTC", "python launch/benchmark.py attention", "0123abcd", "A CPU", {"torch": "2.0"}
)


def times(forward: float, backward: float) -> Times:
    both = forward + backward
    return {
        "forward": Timing(forward, forward - 1, forward + 1),
        "backward": Timing(backward, backward - 1, backward + 1),
        "both": Timing(both, both - 2, both + 2),
    }


def measured(layout: str, density: float, spent: Times, backend: str = "blockwise") -> Measured:
    return Measured(
        layout,
        {"mode": "fixed", "block": 16},
        backend,  # type: ignore[arg-type]
        density,
        spent,
        dict.fromkeys(PASSES, 0.5),
        3 * 2**20,
        1e-7,
    )


def group_of(num_tokens: int = 4096, block: int = 16) -> Group:
    """Two dense kernels, each the faster one in a pass; fixed at density 0.1; flex, forward alone."""
    dense = (
        Dense("flash", times(100, 300), 2**20),
        Dense("cudnn", times(120, 250), 2**20),
    )
    full = (
        measured(FULL, 1.0, times(200, 500)),
        measured(FULL, 1.0, {"forward": Timing(400, 400, 400)}, "flex"),
    )
    group = Group(num_tokens, block, dense, full, ())
    sparse = [
        measured("fixed", 0.1, times(20, 40)),
        measured("fixed", 0.1, {"forward": Timing(40, 39, 41)}, "flex"),
    ]
    return replace(group, sparse=tuple(compare(one, group) for one in sparse))


def test_each_pass_is_compared_with_the_dense_kernel_that_is_fastest_in_it():
    group = group_of()
    assert [group.best_dense(which).kernel for which in PASSES] == ["flash", "cudnn", "cudnn"]
    ours = group.sparse[0]
    assert ours.speedup == pytest.approx({"forward": 100 / 20, "backward": 250 / 40, "both": 370 / 60})
    assert ours.efficiency["forward"].total == pytest.approx(5 * 0.1)
    assert ours.efficiency["forward"].kernel == pytest.approx(100 / 200)
    assert ours.efficiency["both"].kernel == pytest.approx(370 / 700)
    assert ours.efficiency["both"].tile == 0.5


def test_a_backend_is_split_by_its_own_run_of_the_full_layout():
    flex = group_of().sparse[1]
    assert flex.efficiency["forward"].kernel == pytest.approx(100 / 400)
    assert set(flex.speedup) == {"forward"}


def test_a_row_has_density_times_with_quartiles_efficiency_split_and_memory():
    rows = group_rows(group_of())
    assert all(len(row) == len(HEADER) for row in rows)
    named = dict(zip(HEADER, rows[4], strict=True))
    assert named == {
        "layout": "fixed",
        "density": "0.100",
        "backend": "blockwise",
        "forward ms": "20 (19 to 21)",
        "backward ms": "40 (39 to 41)",
        "both ms": "60 (58 to 62)",
        "speed-up": "5.00 / 6.25 / 6.17",
        "efficiency": "0.50 / 0.62 / 0.62",
        "kernel x tile x schedule": "0.53 x 0.50 x 2.33",
        "memory": "3.0 MiB",
    }
    assert rows[5][3:6] == ["40 (39 to 41)", "-", "-"]
    assert [row[0] for row in rows] == ["dense, flash", "dense, cudnn", FULL, FULL, "fixed", "fixed"]


def test_the_terminal_says_the_same_a_line_a_pass():
    rows = pass_rows(group_of())
    assert all(len(row) == len(PASS_HEADER) for row in rows)
    (ours,) = (index for index, row in enumerate(rows) if row[0] == "fixed")
    assert [row[1] for row in rows[ours : ours + 3]] == ["forward", "backward", "both"]
    assert rows[ours + 2][2:] == ["60 (58 to 62)", "6.17", "0.62", "0.53 x 0.50 x 2.33"]
    assert rows[ours + 1][0].strip() == "blockwise, 0.100"
    (flex,) = (row for row in rows if row[0].startswith("fixed\n"))
    assert "flex, 0.100" in flex[0]
    assert "3.0 MiB" in flex[0]


def test_long_times_are_whole_milliseconds_with_commas():
    group = group_of()
    slow = replace(group.sparse[0], times=times(1234.5, 99.95))
    assert group_rows(replace(group, sparse=(slow,)))[-1][3:5] == [
        "1,234 (1,234 to 1,236)",
        "100 (99 to 101)",
    ]


def test_files_hold_everything_and_where_it_comes_from(tmp_path: Path):
    groups = [group_of(n, block) for n in (4096, 8192) for block in (16, 64)]
    files = save_attention(tmp_path, "attention_x", groups, SIZES, {"triton": "no GPU"}, [1000, 1100], ORIGIN)
    assert [file.name for file in files] == ["attention_x.json", "attention_x.md", "attention_x.png"]
    saved = json.loads(files[0].read_text(encoding="utf-8"))
    assert saved["provenance"]["git_commit"] == "0123abcd"
    assert saved["clocks_mhz"] == [1000, 1100]
    assert saved["sizes"]["dtype"] == "float32"
    fixed = saved["groups"][0]["sparse"][0]
    assert fixed["times"]["both"] == {"median_ms": 60, "lower_ms": 58, "upper_ms": 62}
    assert set(fixed["efficiency"]["both"]) == {"total", "kernel", "tile", "schedule"}
    text = files[1].read_text(encoding="utf-8")
    for needed in (ORIGIN.command, ORIGIN.hardware, ORIGIN.date, "0123abcd", "torch 2.0", "triton; no GPU"):
        assert needed in text
    assert text.count("\n## ") == 4
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_panels_are_a_column_a_block_and_curves_are_the_medians():
    rows = attention_panels([group_of(n, block) for n in (8192, 4096) for block in (64, 16)])
    assert [[panel.title.split(":")[0] for panel in row] for row in rows] == [["block 16", "block 64"]] * 3
    forward, both, efficiency = (row[0] for row in rows)
    assert [(curve.label, curve.is_dashed) for curve in forward.curves] == [
        ("dense", False),
        ("fixed", False),
        ("fixed", True),
    ]
    assert both.curves[1].lengths == [4096, 8192]
    assert both.curves[1].values == [60, 60]
    assert both.curves[0].values == [370, 370]
    assert efficiency.curves[0].values == pytest.approx([370 / 60 * 0.1] * 2)


def test_without_a_backward_pass_efficiency_is_the_forward_pass():
    group = group_of()
    rows = attention_panels([replace(group, sparse=group.sparse[1:])])
    assert len(rows) == 2
    assert rows[1][0].title == "block 16: efficiency, forward"


def test_a_markdown_table_has_a_header_a_rule_and_rows():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_shared_heads_are_said():
    assert subject(SIZES) == "Block-sparse attention, 8 heads (2 of keys and values) of 64, float32"
