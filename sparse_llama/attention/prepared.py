"""What the cores make of a layout, made once and kept with it; and a layout that grows with its inputs."""

import math
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from sparse_llama.attention.blockwise import ChunkedLayout
from sparse_llama.attention.documents import Documents
from sparse_llama.config.sparsity import Sparsity
from sparse_llama.layouts import Layout, build_layout, extends

if TYPE_CHECKING:
    from sparse_llama.attention.tiles import TiledLayout


class PreparedLayout:
    """A layout and each core's own tables of it, all of them made when first asked for."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.chunked = ChunkedLayout(layout)
        # one row of blocks serves a block of tokens and all layers of a model
        self.keys_of_row = lru_cache(maxsize=2)(self._keys_of_row)
        self._flex_mask: tuple[Documents, torch.device, Any] | None = None

    def is_causal_at(self, num_tokens: int) -> bool:
        """Return whether attention is full for a document of this length."""
        return self.chunked.is_causal_at(num_tokens)

    @cached_property
    def tiled(self) -> "TiledLayout":
        """The Triton kernels' tables."""
        from sparse_llama.attention.tiles import TiledLayout

        return TiledLayout(self.layout)

    def flex_mask(self, documents: Documents, device: torch.device) -> Any:
        """Return FlexAttention's mask of a batch; the last one is kept for the other layers."""
        from sparse_llama.attention.flex import block_mask  # seconds to import, and few need it

        if self._flex_mask is None or self._flex_mask[:2] != (documents, device):
            self._flex_mask = (documents, device, block_mask(self.layout, documents, device))
        return self._flex_mask[2]

    def _keys_of_row(self, row: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the tokens that block row ``row`` sees, (patterns, S) int64, and which of them are real.

        Every line ends with the row's own block. Shorter lines begin with padding; the second value, equally
        large, is None where there is none.
        """
        block = self.layout.block
        lines = [
            torch.cat([torch.arange(start * block, end * block) for start, end in pattern.row(row)])
            for pattern in self.layout.patterns
        ]
        width = max(line.numel() for line in lines)
        tokens = torch.zeros(len(lines), width, dtype=torch.int64)
        is_real = torch.zeros(len(lines), width, dtype=torch.bool)
        for index, line in enumerate(lines):
            tokens[index, width - line.numel() :] = line
            is_real[index, width - line.numel() :] = True
        return tokens.to(device), None if bool(is_real.all()) else is_real.to(device)


def prepare(layout: Layout) -> PreparedLayout:
    """Return what the cores make of ``layout``, the same for every call."""
    prepared = layout.derived.get(PreparedLayout)
    if prepared is None:
        prepared = layout.derived[PreparedLayout] = PreparedLayout(layout)
    return prepared


class MasterLayout:
    """The layout of a model's longest sequence, from which shorter ones are cropped.

    A mode whose longer layouts begin with the shorter ones (``layouts.extends``) is made anew for a longer
    input: no token's row changes. Any other ends at the length that the model was trained with.
    """

    def __init__(self, sparsity: Sparsity, *, num_heads: int, num_tokens: int, seed: int) -> None:
        self.sparsity, self.num_tokens, self.seed = sparsity, num_tokens, seed
        self._num_heads = num_heads
        self._num_blocks = -(-num_tokens // sparsity.block)
        self.can_grow = extends(sparsity, self._num_blocks)
        self.layout = self._build(self._num_blocks)

    def at(self, num_tokens: int) -> Layout:
        """Return a layout for documents of up to ``num_tokens``.

        Raises:
            ConfigError: the document is longer than the master, and the mode cannot be extended.
        """
        if num_tokens > self.layout.num_tokens and self.can_grow:
            times = math.ceil(num_tokens / (self._num_blocks * self.sparsity.block))
            # Doubled: made anew rarely, and a multiple of the same windows as before.
            self.layout = self._build(self._num_blocks * 2 ** math.ceil(math.log2(times)))
        self.layout.blocks_of(num_tokens)
        return self.layout

    def _build(self, num_blocks: int) -> Layout:
        return build_layout(self.sparsity, self._num_heads, num_blocks, self.seed)
