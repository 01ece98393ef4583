"""What ``launch/show_layout.py`` says of a layout: numbers, pictures, what a token sees, what it is worth."""

import json
from dataclasses import dataclass

import torch

from sparse_llama.cli.layout_choice import Choice, LayerGroup, find_document
from sparse_llama.cli.layout_words import in_short, ranges
from sparse_llama.layouts import Layout, build_layout
from sparse_llama.layouts.cells import Grid, Span, count_causal_pairs, count_pairs, seen_tokens
from sparse_llama.reporting.expectation import Work, expected_rows
from sparse_llama.reporting.layout_picture import Picture


@dataclass(frozen=True)
class View:
    """The sparse layout of a group of layers over a row of documents."""

    group: LayerGroup
    layout: Layout
    """The master that the documents' layouts are cropped from."""
    documents: tuple[Span, ...]
    densities: tuple[float, ...]
    """Share of the documents' causal token pairs that attend, of each pattern."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the row, up to the end of its last document."""
        return self.documents[-1][1]

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.layout.block)

    def patterns(self, head: int | None) -> list[int]:
        """Return the patterns of all heads, or the one of ``head``."""
        return list(range(len(self.layout.patterns))) if head is None else [self.layout.head_patterns[head]]

    def density(self) -> float:
        """Return the share of the documents' causal token pairs that attend, averaged over heads."""
        return sum(self.densities[pattern] for pattern in self.layout.head_patterns) / len(
            self.layout.head_patterns
        )

    def rows(self) -> list[tuple[str, str]]:
        """Return label and value of what is said in numbers."""
        assert self.group.sparsity is not None
        block, heads, count = self.layout.block, len(self.layout.head_patterns), len(self.layout.patterns)
        longest = max(last - first for first, last in self.documents)
        master = "" if longest == self.layout.num_tokens else f"; the master has {self.layout.num_tokens:,}"
        rows = [
            ("sparse_attention", json.dumps(self.group.sparsity.model_dump(mode="json", exclude_none=True))),
            ("tokens", f"{self.num_tokens:,} in {self.num_blocks:,} blocks of {block}{master}"),
        ]
        if len(self.documents) > 1:
            rows.append(("documents", f"{len(self.documents)}: tokens {ranges(self.documents)}"))
        within = "" if len(self.documents) == 1 else ", within documents"
        rows.append(("density", f"{100 * self.density():.1f}% of the causal token pairs{within}"))
        rows.append(("patterns", f"1, of all {heads} heads" if count == 1 else f"{count}, of {heads} heads"))
        return rows

    def title(self, pattern: int) -> str:
        """Return whose a pattern is, and its density."""
        heads = [head for head, own in enumerate(self.layout.head_patterns) if own == pattern]
        if len(heads) == len(self.layout.head_patterns):
            whose = "all heads"
        else:
            whose = ("head " if len(heads) == 1 else "heads ") + in_short(heads)
        return f"{whose}, density {100 * self.densities[pattern]:.1f}%"

    def picture(self, pattern: int, cells: tuple[int, int], token: int | None) -> Picture:
        """Return a pattern's picture in cells of rows x columns of blocks."""
        block = self.layout.block
        grid = Grid(self.num_tokens, block, *cells)
        active = count_pairs(self.layout.patterns[pattern], self.documents, grid)
        shares = active / count_causal_pairs(grid).to(torch.float64)  # 0 / 0 is NaN: no earlier key
        sides = (block * cells[0], block * cells[1])
        return Picture(self.title(pattern), shares, self.num_tokens, *sides, token)

    def seen(self, pattern: int, token: int) -> str:
        """Return which tokens ``token`` sees."""
        number, document = find_document(self.documents, token)
        spans = seen_tokens(self.layout.patterns[pattern], self.layout.block, document, token)
        total = sum(last - first for first, last in spans)
        place = "" if len(self.documents) == 1 else f" of document {number + 1}"
        return f"token {token}{place} sees {ranges(spans)} ({total:,} of {token - document[0] + 1:,})"


def make_view(choice: Choice, group: LayerGroup) -> View:
    """Return the view of a group of layers.

    Raises:
        ConfigError: the mode asks for more blocks than the longest sequence has.
    """
    assert group.sparsity is not None
    num_blocks = -(-choice.master_length // group.sparsity.block)
    layout = build_layout(group.sparsity, num_heads=choice.num_heads, num_blocks=num_blocks, seed=choice.seed)
    whole = Grid(choice.documents[-1][1], layout.block, num_blocks, num_blocks)
    causal = num_causal_pairs(choice.documents)
    pairs = (count_pairs(pattern, choice.documents, whole) for pattern in layout.patterns)
    return View(group, layout, choice.documents, tuple(int(count.sum()) / causal for count in pairs))


def expectations(choice: Choice, densities: list[float]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return title and rows of what to expect of the model, or of each group of layers where it is not known
    how many layers each has.

    Args:
        densities: of the groups of ``choice``; 1 is dense.
    """
    pairs = num_causal_pairs(choice.documents)
    num_tokens = sum(last - first for first, last in choice.documents)
    shares = [group.share for group in choice.groups if group.share is not None]
    if len(shares) == len(densities):
        work = Work(num_tokens, pairs, tuple(zip(shares, densities, strict=True)))
        return [("expected speed-up over dense attention", expected_rows(work))]
    return [
        (
            f"expected speed-up with the layout of {group.name} everywhere",
            expected_rows(Work(num_tokens, pairs, ((1.0, density),))),
        )
        for group, density in zip(choice.groups, densities, strict=True)
        if group.sparsity is not None
    ]


def num_causal_pairs(documents: tuple[Span, ...]) -> int:
    """Return the token pairs of dense attention."""
    return sum((last - first) * (last - first + 1) // 2 for first, last in documents)
