"""The longest row that fits is found exactly, with few estimates: checked against formulas solved by hand."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shipped_runs import A100, SEVEN_B, estimator, run_of, seven_b

from sparse_llama.config.layers import layer_sparsities
from sparse_llama.config.run import Run
from sparse_llama.planning.hardware import GIB, GPU_RESERVE_BYTES, Hardware
from sparse_llama.planning.levers import tile
from sparse_llama.planning.search import MOST_TOKENS, Planner, at_length

USABLE = 40 * GIB - GPU_RESERVE_BYTES


def affine(*lines: tuple[int, int], host: int = 0):
    """Return a formula: the largest of ``fixed + slope x tokens`` on the GPU, ``host`` bytes a token."""

    def formula(run: Run):
        length = run.settings.seq_length
        return {"gpu": max(fixed + slope * length for fixed, slope in lines), "host": host * length}

    return formula


def planner(formula, asked: list[int] | None = None, hardware: Hardware = A100, ranks: int = 1) -> Planner:
    return Planner(seven_b(), hardware, ranks, estimator(formula, asked))


def test_the_longest_row_is_where_the_line_crosses_the_budget():
    """The notes' own figures of a checkpoint per layer: 13.48 GB + 646,684 B a token reach 43,086 tokens."""
    fixed, slope = 13_476_000_000, 646_684
    asked: list[int] = []
    found = planner(affine((fixed, slope)), asked).longest(run_of(attention="dense"))
    assert found.num_tokens == (USABLE - fixed) // slope // 64 * 64
    assert found.binds == "gpu"
    assert len(asked) <= 6


@pytest.mark.parametrize("seed", range(12))
def test_the_largest_of_several_lines_is_crossed_exactly_and_in_few_estimates(seed: int):
    """Logits at first, then norms, then attention: the peak moves with the length."""
    draw = random.Random(seed)
    lines = [(draw.randrange(int(38 * GIB)), draw.randrange(1_000, 4_000_000)) for _ in range(4)]
    per_token = draw.randrange(1, 1_000_000)
    asked: list[int] = []
    found = planner(affine(*lines, host=per_token), asked).longest(run_of(attention="dense"))
    by_gpu = min((USABLE - fixed) // slope for fixed, slope in lines)
    by_host = A100.host_bytes // per_token
    assert found.num_tokens == min(by_gpu, by_host) // 64 * 64
    if abs(by_gpu - by_host) > 64:
        assert found.binds == ("gpu" if by_gpu < by_host else "host")
    assert len(asked) <= 14  # bisection takes 21


@pytest.mark.parametrize("seed", range(6))
def test_a_rough_search_is_within_its_precision_and_takes_fewer_estimates(seed: int):
    draw = random.Random(100 + seed)
    lines = [(draw.randrange(int(20 * GIB)), draw.randrange(50_000, 4_000_000)) for _ in range(3)]
    exact_asked: list[int] = []
    rough_asked: list[int] = []
    exact = planner(affine(*lines), exact_asked).longest(run_of(attention="dense"))
    rough = planner(affine(*lines), rough_asked).longest(run_of(attention="dense"), precision=0.01)
    assert 0.99 * exact.num_tokens <= rough.num_tokens <= exact.num_tokens
    assert len(rough_asked) <= len(exact_asked)


def test_below_a_tile_the_peak_is_not_convex_and_the_search_knows():
    """Logits of up to 2,048 tokens grow by 384,000 B a token, beyond by none: a line through two short rows
    would end the search at 60,000 tokens."""

    def formula(run: Run):
        length = run.settings.seq_length
        return {"gpu": 14 * GIB + 384_000 * min(length, 2048) + 16_000 * length, "host": 0}

    run = tile("loss_tile").apply(run_of(attention="dense"))
    found = planner(formula).longest(run, start=256, precision=0.01)
    exact = (USABLE - 14 * GIB - 384_000 * 2048) // 16_000
    assert 0.99 * exact <= found.num_tokens <= exact


def test_nothing_fits_where_the_weights_do_not():
    found = planner(affine((45 * GIB, 1000))).longest(run_of())
    assert (found.num_tokens, found.estimate, found.binds) == (0, None, "gpu")


def test_a_search_ends_where_memory_is_no_limit():
    found = planner(affine((GIB, 1))).longest(run_of(attention="dense"))
    assert found.num_tokens == MOST_TOKENS
    assert found.binds is None


def test_lengths_are_whole_blocks_of_every_layout():
    """a100_40g.json has blocks of 32; a mask of blocks of 48 makes it multiples of 192."""
    found = planner(affine((20 * GIB, 100_003))).longest(run_of())
    assert found.num_tokens % 64 == 0
    assert planner(affine((0, 1))).step(run_of()) == 64


def test_a_mask_from_a_file_is_as_long_as_it_is(tmp_path: Path):
    file = tmp_path / "mask.npy"
    np.save(file, np.tri(64, dtype=bool))
    layouts = layer_sparsities({"mode": "mask", "path": str(file), "block": 64})
    run = replace(at_length(run_of(), 4096), layouts=layouts)
    asked: list[int] = []
    found = planner(affine((GIB, 1)), asked).longest(run)
    assert found.num_tokens == 4096
    assert max(asked) == 4096


def test_ranks_share_the_host_and_have_a_gpu_each():
    made = planner(affine((GIB, 0), host=1_000_000), ranks=8)
    run = at_length(run_of(ranks=8), 8192)
    assert made.needs(made.at(run)) == {"gpu": GIB, "host": 8 * 8192 * 1_000_000, "disk": 0}


def test_an_estimate_is_made_once():
    asked: list[int] = []
    made = planner(affine((GIB, 1000)), asked)
    run = run_of()
    made.longest(run)
    count = len(asked)
    made.longest(run)
    made.at(run, run.settings.seq_length)
    assert len(asked) == count == len(set(asked))


def test_a_longer_row_has_a_longer_layout_and_a_shorter_one_is_cropped():
    run = run_of()
    assert run.settings.model.path == SEVEN_B
    longer = at_length(run, 65536)
    assert longer.settings.attention.master_length == 65536
    shorter = at_length(run, 512)
    assert (shorter.settings.seq_length, shorter.settings.attention.master_length) == (512, 1024)
