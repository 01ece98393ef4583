"""The modes of DeepSpeed's ``sparse_attention``, bit for bit what its ``make_layout`` returned (0.19.6), and
those that it never had.

Source: ``deepspeed/ops/sparse_attention/sparsity_config.py`` at v0.19.6, the last with it. One function a
mode draws the blocks of head ``head`` in a master layout of N = ``num_blocks``; odd corners included, such
as blocks above the diagonal in "unidirectional" ``fixed`` and ``variable``. Causality is ``layout.py``'s.

One departure, where DeepSpeed raised ``ValueError: Sample larger than population``: unidirectional
``bigbird`` samples min(R, row + 1) of a row's blocks.
"""

import random

import torch

from sparse_llama.config.sparsity import (
    BigBirdSparsity,
    BSLongformerSparsity,
    FixedSparsity,
    LocalSlidingWindowSparsity,
    S2Sparsity,
    Sparsity,
    StridedSparsity,
    VariableSparsity,
)
from sparse_llama.layouts.drawing import Corners, Drawing
from sparse_llama.layouts.intervals import Triple


def draw(sparsity: Sparsity, head: int, num_blocks: int, rng: random.Random) -> Drawing:
    """Return one head's layout as DeepSpeed makes it; takes random blocks from ``rng``, head after head.

    Args:
        head: for ``s2`` 1 or 0, whether groups are shifted.
    """
    match sparsity:
        case FixedSparsity():
            return _fixed(sparsity, head, num_blocks)
        case VariableSparsity():
            return _variable(sparsity, num_blocks, rng)
        case BigBirdSparsity():
            return _bigbird(sparsity, num_blocks, rng)
        case BSLongformerSparsity():
            return _bslongformer(sparsity, num_blocks)
        case LocalSlidingWindowSparsity():
            size = sparsity.num_sliding_window_blocks
            return Drawing(num_blocks, (_window(size, num_blocks, _is_causal(sparsity)),))
        case StridedSparsity():
            return _strided(sparsity, num_blocks)
        case S2Sparsity():
            return _s2(sparsity, num_blocks, is_shifted=head == 1)
        case _:
            return Drawing(num_blocks, rectangles=((0, num_blocks, 0, num_blocks),))


def _fixed(sparsity: FixedSparsity, head: int, num_blocks: int) -> Drawing:
    """Child et al. 2019 (arXiv:1904.10509), section 4.3: windows, and the last blocks of each seen by all."""
    local, wide = sparsity.num_local_blocks, sparsity.num_global_blocks
    is_causal = _is_causal(sparsity)
    rows = torch.arange(num_blocks)
    window_starts = rows // local * local
    window_ends = rows + 1 if is_causal else (window_starts + local).clamp(max=num_blocks)
    corners: list[Corners] = []

    def add_global(start: int, end: int) -> None:
        corners.append((start if is_causal else 0, num_blocks, start, end))
        if sparsity.horizontal_global_attention:
            corners.append((start, end, 0, num_blocks))

    first = local - (1 + head % sparsity.num_different_global_patterns) * wide
    whole_windows_end = num_blocks - num_blocks % local
    for start in range(first, whole_windows_end, local):
        add_global(start, min(start + wide, num_blocks))
    if whole_windows_end < num_blocks:  # the last window is cut: its global blocks move to its end
        start = min(whole_windows_end + first, num_blocks - wide)
        start, end, _ = slice(start, start + wide).indices(num_blocks)  # wide > num_blocks makes it negative
        add_global(start, end)
    return Drawing(num_blocks, ((rows, window_starts, window_ends),), tuple(corners))


def _variable(sparsity: VariableSparsity, num_blocks: int, rng: random.Random) -> Drawing:
    """Windows of the given sizes, the last size repeating, given global blocks, random blocks."""
    is_causal = _is_causal(sparsity)
    rows = torch.arange(num_blocks)
    sizes = list(sparsity.local_window_blocks)
    bounds = [0]
    while bounds[-1] < num_blocks:
        bounds.append(bounds[-1] + (sizes.pop(0) if len(sizes) > 1 else sizes[0]))
    edges = torch.tensor(bounds).clamp(max=num_blocks)
    window = torch.bucketize(rows, edges, right=True)
    local = (rows, edges[window - 1], rows + 1 if is_causal else edges[window])
    corners: list[Corners] = []
    for start, end in _global_ranges(sparsity, num_blocks):
        if sparsity.horizontal_global_attention:
            corners.append((start, end, 0, num_blocks))
        corners.append((start if is_causal else 0, num_blocks, start, end))
    drawn = _random_blocks([num_blocks] * num_blocks, sparsity.num_random_blocks, rng)
    return Drawing(num_blocks, (local, drawn), tuple(corners))


def _bigbird(sparsity: BigBirdSparsity, num_blocks: int, rng: random.Random) -> Drawing:
    """Zaheer et al. 2020 (arXiv:2007.14062), section 2: random blocks, a window, the first blocks global."""
    is_causal, wide = _is_causal(sparsity), sparsity.num_global_blocks
    populations = [row + 1 if is_causal else num_blocks for row in range(num_blocks)]
    drawn = _random_blocks(populations, sparsity.num_random_blocks, rng)
    window = _window(sparsity.num_sliding_window_blocks, num_blocks, is_causal=False)
    corners = ((0, wide, 0, num_blocks), (0, num_blocks, 0, wide))
    return Drawing(num_blocks, (drawn, window), corners, is_lower=is_causal)


def _bslongformer(sparsity: BSLongformerSparsity, num_blocks: int) -> Drawing:
    """Beltagy et al. 2020 (arXiv:2004.05150), section 3.1: a window and symmetric global blocks."""
    corners: list[Corners] = []
    for start, end in _global_ranges(sparsity, num_blocks):
        corners += [(start, end, 0, num_blocks), (0, num_blocks, start, end)]
    window = _window(sparsity.num_sliding_window_blocks, num_blocks, is_causal=False)
    return Drawing(num_blocks, (window,), tuple(corners), is_lower=_is_causal(sparsity))


def _strided(sparsity: StridedSparsity, num_blocks: int) -> Drawing:
    """Child et al. 2019 (arXiv:1904.10509), section 4.2, both kinds of heads in one as in section 4.3.

    The paper's window has one more block, the nearest of every ``stride``-th: the union is the same.
    """
    rows, stride = torch.arange(num_blocks), sparsity.stride
    window = (rows, (rows - stride + 1).clamp(min=0), (rows + stride).clamp(max=num_blocks))
    return Drawing(num_blocks, (window,), stride=stride, is_lower=_is_causal(sparsity))


def _s2(sparsity: S2Sparsity, num_blocks: int, *, is_shifted: bool) -> Drawing:
    """Chen et al. 2024 (arXiv:2309.12307), section 3.2, without its wrap-around: see ``S2Sparsity``."""
    rows, size = torch.arange(num_blocks), sparsity.group_blocks
    shift = size // 2 if is_shifted else 0
    starts = (rows + shift) // size * size - shift
    ends = rows + 1 if _is_causal(sparsity) else (starts + size).clamp(max=num_blocks)
    return Drawing(num_blocks, ((rows, starts.clamp(min=0), ends),))


def _window(size: int, num_blocks: int, is_causal: bool) -> Triple:
    rows, reach = torch.arange(num_blocks), size // 2
    ends = rows + 1 if is_causal else (rows + reach + 1).clamp(max=num_blocks)
    return rows, (rows - reach).clamp(min=0), ends


def _global_ranges(
    sparsity: VariableSparsity | BSLongformerSparsity, num_blocks: int
) -> list[tuple[int, int]]:
    """Return the [start, end) of the global blocks; a negative index counts from the end, as in Python."""
    ends = sparsity.global_block_end_indices
    ranges: list[tuple[int, int]] = []
    for position, start in enumerate(sparsity.global_block_indices):
        if start >= num_blocks:
            continue
        # DeepSpeed sets layout[..., start] for a single block and layout[..., start:end] for a range.
        end = (start + 1 or None) if ends is None else min(ends[position], num_blocks)
        first, last, _ = slice(start, end).indices(num_blocks)
        ranges.append((first, last))
    return ranges


def _random_blocks(populations: list[int], count: int, rng: random.Random) -> Triple:
    """Return for each row ``rng.sample(range(population), min(count, population))``.

    A few of many are drawn here, in a third of the time: so many bits each, again where too large or had.
    """
    starts: list[int] = []
    draw_bits = rng.getrandbits
    for population in populations if count else ():
        if count > 5 or population <= 21:
            starts += rng.sample(range(population), min(count, population))
            continue
        num_bits = population.bit_length()
        row: list[int] = []
        for _ in range(count):
            block = draw_bits(num_bits)
            while block >= population or block in row:
                block = draw_bits(num_bits)
            row.append(block)
        starts += row
    heights = torch.tensor(populations).clamp(max=count)
    rows = torch.repeat_interleave(torch.arange(len(populations)), heights)
    drawn = torch.tensor(starts, dtype=torch.int64)
    return rows, drawn, drawn + 1


def _is_causal(
    sparsity: FixedSparsity
    | VariableSparsity
    | BigBirdSparsity
    | BSLongformerSparsity
    | LocalSlidingWindowSparsity
    | StridedSparsity
    | S2Sparsity,
) -> bool:
    return sparsity.attention == "unidirectional"
