"""LLaMA with what plain LLaMA cannot hold: gated attention over a learned prompt (LLaMA-Adapter,
arXiv:2303.16199), a block-sparse layout, and a bias on the head.

This file travels with an exported model and needs torch and transformers only:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Each prompted layer adds gate_h * softmax(q_h K^T * scale) V to the attention of query head h. The prompt's K
and V were computed once, at export; they are not rotated, and every token sees all of them.

With a layout, token i of a sequence sees the tokens j <= i in the blocks that row i // block of the layout
lists, in prefill and in decoding alike. No S x S mask is made: a few block rows at a time gather the keys
they see. Batches may be padded on either side; packed rows are refused, and so is a sequence that is longer
than the layout. Without a layout attention is PyTorch's own.

``B`` batch, ``T`` new tokens, ``S`` tokens so far, ``H`` query heads, ``K`` key/value heads, ``D`` head
width, ``P`` prompt tokens, ``N`` blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

DENSE, SPARSE = "sparse_llama_dense", "sparse_llama_sparse"
_CHUNK_TOKENS = 128  # query tokens that gather their keys together: fewer calls against more masked pairs


class SparseLlamaConfig(LlamaConfig):
    """LLaMA's configuration and the shapes of what is added; see ``SparseLlamaForCausalLM``."""

    model_type = "sparse_llama"

    # Not annotated: annotated ones would be dataclass fields in some releases of transformers and not in
    # others. As plain defaults they behave the same in all, and what a config.json gives is set over them.
    prompt_layers = ()
    """Indices of the layers with a prompt."""
    prompt_length = 0
    lm_head_bias = False
    layouts = ()
    """The sizes ``block``, ``num_blocks``, ``num_patterns`` and ``num_intervals`` of each layout."""
    layer_layouts = ()
    """Of every layer the index of its layout, None for full causal attention; empty is None for all."""


class GatedPrompt(nn.Module):
    """A layer's prompt, already projected to keys and values, and a gate per query head."""

    def __init__(self, config: SparseLlamaConfig) -> None:
        super().__init__()
        shape: Any = (config.num_key_value_heads, config.prompt_length, config.head_dim)
        self.key = nn.Parameter(torch.zeros(shape))  # (K, P, D)
        self.value = nn.Parameter(torch.zeros(shape))  # (K, P, D)
        self.gate = nn.Parameter(torch.zeros(config.num_attention_heads))  # (H,)

    def forward(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return the gated attention of (B, H, T, D) queries to the prompt, (B, T, H, D)."""
        num_kv_heads = self.key.shape[0]
        grouped = query.unflatten(1, (num_kv_heads, -1))  # (B, K, H / K, T, D)
        scores = torch.einsum("bkgtd,kpd->bkgtp", grouped, self.key).float() * scaling
        gated = scores.softmax(-1) * self.gate.float().view(num_kv_heads, -1, 1, 1)
        output = torch.einsum("bkgtp,kpd->bkgtd", gated.to(query.dtype), self.value)
        return output.flatten(1, 2).transpose(1, 2)


class BlockLayout(nn.Module):
    """Which blocks each block row sees, as intervals of columns, per pattern; and each head's pattern."""

    row_starts: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    head_patterns: torch.Tensor

    def __init__(self, sizes: dict[str, int], num_heads: int) -> None:
        super().__init__()
        self.block, self.num_blocks = sizes["block"], sizes["num_blocks"]

        def table(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        # Row i of pattern p owns the intervals row_starts[p, i] to row_starts[p, i + 1].
        self.register_buffer("row_starts", table(sizes["num_patterns"], self.num_blocks + 1))
        self.register_buffer("starts", table(sizes["num_intervals"]))
        self.register_buffer("ends", table(sizes["num_intervals"]))
        self.register_buffer("head_patterns", table(num_heads))
        self._lists: tuple[list[list[int]], list[int], list[int], list[int]] | None = None

    @property
    def num_tokens(self) -> int:
        return self.block * self.num_blocks

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Return the (B, H, T, D) attention of the last T tokens of sequences of S tokens.

        Raises:
            ValueError: a sequence is longer than the layout.
        """
        last, dtype = key.shape[2], query.dtype
        if last > self.num_tokens:
            raise ValueError(
                f"this model's sparse layout is made for {self.num_tokens} tokens, the sequence has {last}; "
                "use a shorter prompt or fewer new tokens"
            )
        if query.device.type == "cpu" and dtype != torch.float64:
            query, key, value = query.float(), key.float(), value.float()  # 16-bit kernels are slow on CPUs
        output = torch.empty_like(query)
        for pattern, heads in enumerate(self._heads()):
            where = torch.tensor(heads, device=query.device)
            shared = where // (query.shape[1] // key.shape[1])
            for rows, tokens, mask in self._chunks(pattern, last - query.shape[2], last):
                there = tokens.to(query.device)
                output[:, where, rows] = F.scaled_dot_product_attention(
                    query[:, where, rows],
                    key[:, :, there][:, shared],
                    value[:, :, there][:, shared],
                    attn_mask=None if mask is None else mask.to(query.device),
                    scale=scaling,
                )
        return output.to(dtype)

    def _chunks(
        self, pattern: int, first: int, last: int
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """Yield, for runs of the query tokens [first, last): their slice counted from ``first``, the key
        tokens that any of them sees, and the (queries, keys) mask, None where all see all."""
        block = self.block
        rows_each = max(1, _CHUNK_TOKENS // block)
        num_rows = -(-last // block)
        for top in range(first // block, num_rows, rows_each):
            bottom = min(top + rows_each, num_rows)
            low, high = max(first, top * block), min(last, bottom * block)
            seen = self._rows(pattern, top, bottom)  # (rows, bottom)
            columns = seen.any(0).nonzero()[:, 0]
            tokens = (columns[:, None] * block + torch.arange(block)).flatten()
            tokens = tokens[tokens < high]  # the last block may be ragged
            queries = torch.arange(low, high)
            mask = seen[queries // block - top][:, tokens // block] & (tokens <= queries[:, None])
            yield slice(low - first, high - first), tokens, None if bool(mask.all()) else mask

    def _rows(self, pattern: int, top: int, bottom: int) -> torch.Tensor:
        row_starts, starts, ends, _ = self._as_lists()
        seen = torch.zeros(bottom - top, bottom, dtype=torch.bool)
        for row in range(top, bottom):
            for index in range(row_starts[pattern][row], row_starts[pattern][row + 1]):
                seen[row - top, starts[index] : ends[index]] = True
        return seen

    def _heads(self) -> list[list[int]]:
        of_head = self._as_lists()[3]
        return [
            [head for head, its in enumerate(of_head) if its == pattern]
            for pattern in range(max(of_head) + 1)
        ]

    def _as_lists(self) -> tuple[list[list[int]], list[int], list[int], list[int]]:
        # Read back from the device once, not at every token.
        if self._lists is None:
            tables = (self.row_starts, self.starts, self.ends, self.head_patterns)
            if int(self.row_starts.max()) == 0:
                raise ValueError("this model's layout is empty: open it with from_pretrained, which reads it")
            self._lists = tuple(table.tolist() for table in tables)  # type: ignore[assignment]
        return self._lists  # type: ignore[return-value]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._lists = None
        super()._load_from_state_dict(*args, **kwargs)  # pyright: ignore[reportCallIssue]


class SparseLlamaForCausalLM(LlamaForCausalLM):
    """LLaMA with prompts, a layout and a head bias, whichever the configuration names.

    Raises:
        ValueError: an attention implementation is asked for; there is one, and others would leave out the
            prompts and the layout.
    """

    config_class = SparseLlamaConfig
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False

    def __init__(self, config: SparseLlamaConfig) -> None:
        name = SPARSE if config.layouts else DENSE
        _register()
        _check_implementation(config._attn_implementation, name)
        config._attn_implementation = name
        super().__init__(config)
        if config.lm_head_bias:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        layouts = [BlockLayout(sizes, config.num_attention_heads) for sizes in config.layouts]
        if layouts:
            self.layouts = nn.ModuleList(layouts)
        for index, layer in enumerate(self.model.layers):
            attention: Any = layer.self_attn
            own = config.layer_layouts[index] if layouts else None
            # in a tuple: as a submodule of every layer it would be saved with each of them
            attention.layout = () if own is None else (layouts[own],)
            if index in config.prompt_layers:
                attention.prompt = GatedPrompt(config)
        self.post_init()

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Accept this model's own implementation only."""
        name = SPARSE if self.config.layouts else DENSE
        _check_implementation(attn_implementation, name)


def _check_implementation(asked: Any, name: str) -> None:
    if asked not in (None, "sdpa", name):  # "sdpa" is what transformers asks for by itself
        raise ValueError(
            f"attn_implementation={asked!r}: this model has its own attention, {name!r}; leave it out"
        )


def _register() -> None:
    AttentionInterface.register(DENSE, _dense_attention)
    AttentionMaskInterface.register(DENSE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    AttentionInterface.register(SPARSE, _sparse_attention)
    AttentionMaskInterface.register(SPARSE, _find_sequences)


def _dense_attention(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, T, D), rotated
    key: torch.Tensor,  # (B, K, S, D)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output, _ = plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    prompt = getattr(module, "prompt", None)
    return output if prompt is None else output + prompt(query, scaling), None


@dataclass(frozen=True)
class _Sequences:
    """Where the sequences of a padded batch lie; what goes through transformers in a mask's place."""

    num_keys: int
    """Tokens of a row so far, padding included; a static cache holds more."""
    spans: tuple[tuple[int, int], ...]
    """Per row the tokens [first, last) that are not padding."""


def _find_sequences(
    batch_size: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | torch.Tensor = 0,
    cache_position: torch.Tensor | None = None,  # before transformers 5.3, in place of the two before
    **kwargs: Any,
) -> _Sequences | None:
    """Return None where every row is one whole sequence; transformers' mask interface.

    Raises:
        ValueError: the tokens of a row that are not padding do not stand together.
    """
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], int(cache_position[0])
    num_keys = int(q_offset) + (kv_length if q_length is None else q_length)
    if attention_mask is None or bool(attention_mask[:, :num_keys].all()):
        return None if num_keys == kv_length else _Sequences(num_keys, ((0, num_keys),) * batch_size)
    spans = []
    for row in attention_mask[:, :num_keys].bool().cpu():
        there = row.nonzero()[:, 0].tolist()
        first, last = (there[0], there[-1] + 1) if there else (num_keys, num_keys)
        if len(there) != last - first:
            raise ValueError(
                "attention_mask: padding between the tokens of a row; a sparse layout counts tokens from the "
                "sequence's first one, so pad at the ends only (to generate, at the left end)"
            )
        spans.append((first, last))
    return _Sequences(num_keys, tuple(spans))


def _sparse_attention(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, T, D), rotated
    key: torch.Tensor,  # (B, K, S, D)
    value: torch.Tensor,
    attention_mask: _Sequences | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None and not isinstance(attention_mask, _Sequences):
        raise ValueError(
            "attention_mask: a mask of pairs of tokens does not go with a sparse layout; give (batch, tokens)"
        )
    sequences = attention_mask or _Sequences(key.shape[2], ((0, key.shape[2]),) * query.shape[0])
    if module.layer_idx == 0:  # the same for all layers, and it waits for the device
        _refuse_packed(sequences, kwargs.get("position_ids"), query.shape[2])
    attend = module.layout[0].attend if module.layout else _attend_to_all  # type: ignore[index]
    first_query = sequences.num_keys - query.shape[2]
    output = torch.zeros_like(query)
    for span in sorted(set(sequences.spans)):
        first, last = max(span[0], first_query), span[1]
        if first >= last:
            continue  # padding only
        rows = [row for row, other in enumerate(sequences.spans) if other == span]
        keys, new = slice(*span), slice(first - first_query, last - first_query)
        parts = (query[rows, :, new], key[rows, :, keys], value[rows, :, keys])
        output[rows, :, new] = attend(*parts, scaling)
    output = output.transpose(1, 2)
    prompt = getattr(module, "prompt", None)
    return output if prompt is None else output + prompt(query, scaling), None


def _attend_to_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return the full causal attention of the last T tokens of sequences of S tokens."""
    num_new, last = query.shape[2], key.shape[2]
    mask = None
    if 1 < num_new < last:
        mask = torch.ones(num_new, last, dtype=torch.bool, device=query.device).tril(last - num_new)
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    is_causal = num_new == last
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scaling)


def _refuse_packed(sequences: _Sequences, position_ids: torch.Tensor | None, num_new: int) -> None:
    if position_ids is None or num_new == 1:
        return
    positions = position_ids.expand(len(sequences.spans), -1).cpu()
    for row, (first, last) in zip(positions, sequences.spans, strict=True):
        start = sequences.num_keys - num_new
        new = row[max(first - start, 0) : max(last - start, 0)]
        if not bool((new.diff() == 1).all()):
            raise ValueError(
                "position_ids: do not count up by one; rows of several packed documents do not go with this "
                "model's sparse layout, so give each document a row of its own"
            )
