"""Attention cores: a definition, and the implementations that have to agree with it."""

from sparse_llama.attention.api import block_sparse_attention

__all__ = ["block_sparse_attention"]
