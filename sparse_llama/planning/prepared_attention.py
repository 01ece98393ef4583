"""What attention has to know of its layouts before it runs without data, and how much work it is."""

from collections.abc import Iterable

import torch
from transformers import LlamaConfig

from sparse_llama.attention.blockwise import ChunkedLayout
from sparse_llama.attention.chunks import Part, Parts
from sparse_llama.attention.dispatch import choose_backend
from sparse_llama.attention.documents import Documents
from sparse_llama.attention.interface import AttentionPlan
from sparse_llama.attention.prepared import prepare
from sparse_llama.attention.tables_size import kernel_sizes
from sparse_llama.attention.ulysses import own_heads
from sparse_llama.layouts import Layout
from sparse_llama.memory.head_groups_call import make_groups


def prepare_layouts(
    plan: AttentionPlan,
    documents: Documents,
    config: LlamaConfig,
    *,
    dtype: torch.dtype,
    target: str,
    head_groups: int | None,
) -> int:
    """Make the tables of every layout of ``plan``, which is this caller's alone; return their bytes on the
    device.

    Tables are made by reading data. Inside of a fake step there is none.
    """
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    table_bytes = 0
    for layout, num_kv_heads in _layouts(plan, documents, config, head_groups):
        prepared = prepare(layout)
        lengths = {group.num_tokens for group in documents.groups}
        if all([prepared.is_causal_at(length) for length in {*lengths, documents.longest}]):
            continue
        backend = choose_backend(layout, torch.device(target), dtype, head_dim, plan.backend)
        if backend == "blockwise":
            prepared.chunked = _LargestCalls(layout, lengths)
        elif backend == "triton":
            table_bytes += kernel_sizes(layout, documents, head_dim, dtype, num_kv_heads).table_bytes
    return table_bytes


def attention_flops(plan: AttentionPlan, documents: Documents, config: LlamaConfig) -> list[float]:
    """Return the operations of one forward pass of attention, of every layer: two products over the pairs of
    tokens that its layout lets attend."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    per_pair = 4 * config.num_attention_heads * head_dim
    flops: dict[object, float] = {}
    for master in dict.fromkeys(plan.layers):
        pairs = 0.0
        for group in documents.groups:
            length = group.num_tokens
            density = 1.0 if master is None else master.at(documents.longest).density_at(length)
            pairs += len(group.rows) * density * length * (length + 1) / 2
        flops[master] = per_pair * pairs
    return [flops[master] for master in plan.layers]


class _LargestCalls(ChunkedLayout):
    """A layout's calls without those that need no more memory than another: a list of thousands, each of
    which is over before the next begins."""

    def __init__(self, layout: Layout, lengths: Iterable[int]) -> None:
        super().__init__(layout)
        made = {
            (pattern, length): _largest(self.parts(pattern, length))
            for pattern in range(len(layout.patterns))
            for length in lengths
            if not self.is_causal_at(length)
        }
        self.parts = lambda pattern, num_tokens: made[pattern, num_tokens]  # type: ignore[assignment]


def _largest(parts: Parts) -> Parts:
    return Parts(tuple(_undominated(parts.leaves)), tuple(_undominated(parts.shared)))


def _undominated(parts: Iterable[Part]) -> list[Part]:
    """Return the calls that no other is at least as large as; a mask that is kept is one that is made."""
    kept_masks = {id(part.leaf): part for part in parts if part.leaf is not None and part.leaf.is_shared}
    by_size = {
        (part.last - part.first, part.num_keys, len(part.spans) > 1): part
        for part in parts
        if part.leaf is None or not part.leaf.is_shared
    }
    largest = [
        part
        for size, part in by_size.items()
        if not any(
            other != size and all(a >= b for a, b in zip(other, size, strict=True)) for other in by_size
        )
    ]
    return [*kept_masks.values(), *largest]


def _layouts(
    plan: AttentionPlan, documents: Documents, config: LlamaConfig, head_groups: int | None
) -> Iterable[tuple[Layout, int]]:
    """Yield every layout that a core is asked for, with the key/value heads beside it."""
    sequence = plan.sequence
    for master in plan.masters:
        layout = master.at(documents.longest)
        for group in make_groups(config, head_groups or 1):
            heads, num_kv_heads = group.heads, len(group.kv_heads)
            if sequence is not None:
                heads, num_kv_heads = own_heads(heads, sequence), max(1, num_kv_heads // sequence.size)
            yield layout.for_heads(heads), num_kv_heads
