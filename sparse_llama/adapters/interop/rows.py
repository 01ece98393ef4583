"""Orders of a projection's rows: what each program does with the vectors of q, k and v.

transformers rotates row i of a head together with row i + D/2 (halves), Meta's code and lit-llama row 2i with
2i + 1 (interleaved). A prompt has no rows of this kind, and the rows of v are not rotated.

``D`` head width, ``G`` query heads per key/value head, ``K`` key/value heads.
"""

import torch


def interleaved(vector: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return a q or k vector in halves as one whose rotated pairs are neighbours."""
    return vector.reshape(-1, 2, head_dim // 2).transpose(1, 2).flatten()


def halves(vector: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return a q or k vector whose rotated pairs are neighbours in halves."""
    return vector.reshape(-1, head_dim // 2, 2).transpose(1, 2).flatten()


def ungrouped(vector: torch.Tensor, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Return a fused vector as q | k | v that holds, for each of K groups, its G query heads, its key and its
    value (litgpt before December 2024)."""
    grouped = vector.reshape(num_kv_heads, -1, head_dim)  # (K, G + 2, D)
    return torch.cat([grouped[:, :-2].flatten(), grouped[:, -2].flatten(), grouped[:, -1].flatten()])
