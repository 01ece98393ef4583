"""The layout that a model attends by: one causal block set per distinct head pattern.

Semantics. A shorter sequence uses the crop [:n, :n] of the layout of the longest length, the *master*: what
DeepSpeed's runtime did, and the only rule under which a token sees the same blocks whatever follows it, so
that decoding equals training. Layouts belong to query heads. Random blocks come from a seed. Blocks above the
diagonal are dropped and the token-causal mask applies inside the diagonal ones, "bidirectional" or not: a
causal language model has no other use for them.

``T`` tokens, ``H`` query heads, ``N`` blocks on a side.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_llama.config.sparsity import MaskSparsity, S2Sparsity, Sparsity, parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts.drawing import Drawing
from sparse_llama.layouts.intervals import Intervals
from sparse_llama.layouts.mask import draw_mask
from sparse_llama.layouts.modes import draw


@dataclass(frozen=True, eq=False)
class Layout:
    """Distinct causal patterns, and which of them each query head has."""

    block: int
    """Tokens on a side of a block."""
    patterns: tuple[Intervals, ...]
    head_patterns: tuple[int, ...]
    """(H,) index into ``patterns``."""
    drawings: tuple[Drawing, ...] = field(repr=False)
    """The patterns before causality: what DeepSpeed's ``make_layout`` returned."""
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What those who use the layout make of it once, such as a kernel's tables; it lives as long as they."""

    @property
    def num_blocks(self) -> int:
        return self.patterns[0].num_rows

    @property
    def num_tokens(self) -> int:
        """The longest sequence that the layout describes."""
        return self.num_blocks * self.block

    @property
    def density(self) -> float:
        """The share of the causal token pairs of the whole layout that attend, averaged over heads."""
        return self.density_at(self.num_tokens)

    def dense(self) -> torch.Tensor:
        """Return the (H, N, N) bool table before causality, as DeepSpeed's ``make_layout``; small N only."""
        tables = torch.stack([drawing.to_dense(self.num_blocks) for drawing in self.drawings])
        return tables[list(self.head_patterns)]

    def crop(self, num_blocks: int) -> "Layout":
        """Return the layout's first ``num_blocks`` rows and columns: what a shorter sequence attends by."""
        if not 1 <= num_blocks <= self.num_blocks:
            raise ConfigError(f"crop: {num_blocks} blocks of a layout of {self.num_blocks}; 1 to all of them")
        patterns = tuple(pattern.first_rows(num_blocks) for pattern in self.patterns)
        return Layout(self.block, patterns, self.head_patterns, self.drawings)

    def for_heads(self, heads: range) -> "Layout":
        """Return the layout of some of the query heads, which still have the patterns of their numbers."""
        if heads == range(len(self.head_patterns)):
            return self
        made: Layout | None = self.derived.get(heads)
        if made is None:
            head_patterns = self.head_patterns[heads.start : heads.stop : heads.step]
            used = sorted(set(head_patterns))
            made = self.derived[heads] = Layout(
                self.block,
                tuple(self.patterns[one] for one in used),
                tuple(used.index(one) for one in head_patterns),
                tuple(self.drawings[one] for one in used),
            )
        return made

    def density_at(self, num_tokens: int) -> float:
        """Return the share of the T (T + 1) / 2 causal token pairs that attend, averaged over heads."""
        shares = [self._num_pairs(pattern, num_tokens) for pattern in self.patterns]
        total = sum(shares[pattern] for pattern in self.head_patterns)
        return total / (len(self.head_patterns) * (num_tokens * (num_tokens + 1) // 2))

    def is_causal_at(self, num_tokens: int) -> bool:
        """Return whether every token of ``num_tokens`` sees all tokens before it, in every head."""
        all_pairs = num_tokens * (num_tokens + 1) // 2
        return all(self._num_pairs(pattern, num_tokens) == all_pairs for pattern in self.patterns)

    def blocks_of(self, num_tokens: int) -> int:
        """Return how many block rows ``num_tokens`` take; the last may be ragged."""
        num_blocks = -(-num_tokens // self.block)
        if num_blocks > self.num_blocks:
            raise ConfigError(
                f"sparse_llama.attention.master_length: the layout is made for {self.num_tokens} tokens, the "
                f"sequence has {num_tokens}; train with a longer master_length, or use a shorter sequence"
            )
        return num_blocks

    def _num_pairs(self, pattern: Intervals, num_tokens: int) -> int:
        num_blocks = self.blocks_of(num_tokens)
        before_diagonal = pattern.first_rows(num_blocks).row_sizes() - 1
        last = num_tokens - (num_blocks - 1) * self.block  # tokens of the last row of blocks
        pairs = int(before_diagonal[:-1].sum()) * self.block**2
        pairs += int(before_diagonal[-1]) * self.block * last
        return pairs + (num_blocks - 1) * self.block * (self.block + 1) // 2 + last * (last + 1) // 2


def build_layout(
    block: Mapping[str, Any] | Sparsity, num_heads: int, num_blocks: int, seed: int = 0
) -> Layout:
    """Return the master layout of ``num_blocks`` blocks.

    Args:
        block: the ``sparse_attention`` object of a configuration.
        seed: of random blocks: those that DeepSpeed drew after ``random.seed(seed)``.

    Raises:
        ConfigError: the object is none, or its mode asks for more blocks than there are.
    """
    sparsity = parse_sparsity(block) if isinstance(block, Mapping) else block
    for name, number in (("num_heads", num_heads), ("num_blocks", num_blocks)):
        if number < 1:
            raise ConfigError(f"build_layout: {name} must be >= 1, got {number}")
    key, needed = sparsity.num_blocks_needed()
    if needed > num_blocks:
        raise ConfigError(
            f"sparse_attention.{key}: {needed} blocks, but the layout has {num_blocks}; "
            f"use at most {num_blocks}"
        )
    if isinstance(sparsity, MaskSparsity):
        drawings, head_patterns = draw_mask(sparsity, num_heads, num_blocks)
    else:
        rng = random.Random(seed)
        drawn_as = _drawn_as(sparsity, num_heads)
        drawings = [draw(sparsity, head, num_blocks, rng) for head in sorted(set(drawn_as))]
        head_patterns = [sorted(set(drawn_as)).index(head) for head in drawn_as]
    patterns = tuple(drawing.causal() for drawing in drawings)
    # Windows and bands hold the diagonal in every mode, so no softmax is over nothing.
    assert all(int(pattern.row_sizes().min()) > 0 for pattern in patterns)
    return Layout(sparsity.block, patterns, tuple(head_patterns), tuple(drawings))


def _drawn_as(sparsity: Sparsity, num_heads: int) -> list[int]:
    """Return as which head each head is drawn."""
    heads = range(num_heads)
    if isinstance(sparsity, S2Sparsity):
        return [int(head >= num_heads // 2) for head in heads]
    if not getattr(sparsity, "different_layout_per_head", False):
        return [0] * num_heads
    if getattr(sparsity, "num_random_blocks", 0) > 0:
        return list(heads)
    return [head % getattr(sparsity, "num_different_global_patterns", 1) for head in heads]
