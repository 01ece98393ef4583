"""Block-sparse attention for whoever has queries, keys and values: no model, no configuration file.

``B`` batch, ``T`` tokens, ``H`` query heads, ``K`` key/value heads, ``D`` head width.
"""

import torch

from sparse_llama.attention.core import attend
from sparse_llama.attention.dispatch import Backend, make_core
from sparse_llama.attention.documents import read_documents, whole_rows
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    scale: float | None = None,
    documents: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the (B, H, T, D) causal attention of ``q`` to ``k`` and ``v`` over the blocks of ``layout``.

    Differentiable; memory is linear in T. A token sees itself, and the tokens before it in the blocks of its
    row of the layout's crop to T. fp32, fp16, bf16 (and fp64 on the CPU).

    Args:
        q: (B, H, T, D).
        k, v: (B, K, T, D); K divides H, and query head h reads key/value head h // (H / K).
        layout: of at least T tokens, for H heads; what the kernels need of it is made once and kept with it.
        scale: of the scores; None is D ** -0.5.
        documents: (B, T) integers, the document of every token, each in one piece and with a layout of its
            own from its first token on; -1 is padding, whose output is 0. For speed documents start at
            multiples of ``layout.block``. None is one document a row.
        backend: auto is the fastest exact one on the tensors' device.

    Raises:
        ConfigError: the shapes do not belong together, the layout is too short, or the backend does not run
            on this device.
    """
    _check_shapes(q, k, v, layout)
    num_rows, _, num_tokens, head_dim = q.shape
    if documents is None:
        found = whole_rows(num_rows, num_tokens)
    else:
        if documents.shape != (num_rows, num_tokens):
            raise ConfigError(
                f"documents: shape {tuple(documents.shape)}, but q has {num_rows} rows of {num_tokens} tokens"
            )
        found = read_documents(documents)
    layout.blocks_of(found.longest)
    scaling = head_dim**-0.5 if scale is None else scale
    core = make_core(layout, found, q, scaling=scaling, backend=backend)
    return attend(core, q, k, v)


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> None:
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in zip("qkv", (q, k, v), strict=True))
    if any(tensor.dim() != 4 for tensor in (q, k, v)):
        raise ConfigError(f"q, k, v: must be (batch, heads, tokens, head width), got {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ConfigError(f"q, k, v: batch, tokens and head width must agree, got {shapes}")
    if q.shape[1] % k.shape[1] != 0:
        raise ConfigError(f"q, k, v: query heads must be a multiple of key/value heads, got {shapes}")
    if len(layout.head_patterns) != q.shape[1]:
        raise ConfigError(f"layout: made for {len(layout.head_patterns)} heads, q has {q.shape[1]}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ConfigError(
            "q, k, v: dtype and device must agree, got "
            + ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in (q, k, v))
        )
