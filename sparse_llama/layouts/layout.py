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

from sparse_llama.config.sparsity import Sparsity, parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts.intervals import Intervals
from sparse_llama.layouts.modes import head_layout


@dataclass(frozen=True, eq=False)
class Layout:
    """Distinct causal patterns, and which of them each query head has."""

    block: int
    """Tokens on a side of a block."""
    patterns: tuple[Intervals, ...]
    head_patterns: tuple[int, ...]
    """(H,) index into ``patterns``."""
    drawn: tuple[Intervals, ...]
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
        return torch.stack([pattern.to_dense() for pattern in self.drawn])[list(self.head_patterns)]

    def crop(self, num_blocks: int) -> "Layout":
        """Return the layout's first ``num_blocks`` rows and columns: what a shorter sequence attends by."""
        if not 1 <= num_blocks <= self.num_blocks:
            raise ConfigError(f"crop: {num_blocks} blocks of a layout of {self.num_blocks}; 1 to all of them")
        patterns = tuple(pattern.first_rows(num_blocks) for pattern in self.patterns)
        drawn = tuple(pattern.first_rows(num_blocks).first_columns(num_blocks) for pattern in self.drawn)
        return Layout(self.block, patterns, self.head_patterns, drawn)

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
        crop = pattern.first_rows(num_blocks)
        rows = crop.rows
        before_diagonal = (crop.ends.minimum(rows) - crop.starts).clamp(min=0)
        last = num_tokens - (num_blocks - 1) * self.block  # tokens of the last row of blocks
        is_last = rows == num_blocks - 1
        pairs = int(before_diagonal[~is_last].sum()) * self.block**2
        pairs += int(before_diagonal[is_last].sum()) * self.block * last
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
    patterns, head_patterns = build_patterns(sparsity, num_heads=num_heads, num_blocks=num_blocks, seed=seed)
    causal = tuple(pattern.causal() for pattern in patterns)
    # Windows and bands hold the diagonal in every mode, so no softmax is over nothing.
    assert all(pattern.row_starts.diff().min() > 0 for pattern in causal)
    return Layout(sparsity.block, causal, tuple(head_patterns), tuple(patterns))


def build_patterns(
    sparsity: Sparsity, *, num_heads: int, num_blocks: int, seed: int
) -> tuple[list[Intervals], list[int]]:
    """Return the distinct patterns as DeepSpeed's ``make_layout`` has them, and the pattern of every head.

    Random blocks are those that DeepSpeed drew after ``random.seed(seed)``.

    Raises:
        ConfigError: the mode asks for more blocks than there are.
    """
    key, needed = sparsity.num_blocks_needed()
    if needed > num_blocks:
        raise ConfigError(
            f"sparse_attention.{key}: {needed} blocks, but the layout has {num_blocks}; "
            f"use at most {num_blocks}"
        )
    rng = random.Random(seed)
    if not getattr(sparsity, "different_layout_per_head", False):
        return [head_layout(sparsity, 0, num_blocks, rng)], [0] * num_heads
    if getattr(sparsity, "num_random_blocks", 0) > 0:
        return [head_layout(sparsity, head, num_blocks, rng) for head in range(num_heads)], list(
            range(num_heads)
        )
    count = min(num_heads, getattr(sparsity, "num_different_global_patterns", 1))
    return [head_layout(sparsity, head, num_blocks, rng) for head in range(count)], [
        head % count for head in range(num_heads)
    ]
