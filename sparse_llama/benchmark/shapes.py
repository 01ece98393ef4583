"""Shapes of LLaMAs that adapters are measured on. Imports no torch: flags are checked against them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What decides a LLaMA's cost."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int

    def layer_flops(self, num_tokens: int, *, is_training: bool) -> int:
        """Return what one layer multiplies and adds, two operations each, for one row.

        A frozen layer's backward pass is the gradient of its input alone: as much as its forward pass, and
        five products in place of two in attention, of which a causal kernel computes half.
        """
        heads = self.num_heads + self.num_kv_heads  # of queries and outputs, and of keys and values
        linear = 2 * num_tokens * self.width * (2 * heads * self.head_dim + 3 * self.mlp_width)
        attention = 2 * num_tokens**2 * self.num_heads * self.head_dim
        return linear * 2 + attention * 7 // 2 if is_training else linear + attention


SHAPES = {
    "small": Shape(4, 256, 4, 4, 64, 688, 2000),
    "narrow": Shape(6, 256, 4, 4, 64, 688, 32000),
    "mid": Shape(8, 1024, 16, 16, 64, 2816, 32000),
    "7b": Shape(32, 4096, 32, 32, 128, 11008, 32000),
}
"""Of whole models; ``7b`` is LLaMA's, ``narrow`` has little but its logits."""
