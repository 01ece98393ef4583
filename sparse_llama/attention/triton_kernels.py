"""Triton kernels of block-sparse flash attention: forward, query gradient, key and value gradient.

The online softmax of Dao 2023 (arXiv:2307.08691) over the units that a table lists instead of over all keys.
A program owns a tile of one side and walks along its lists: first the full one, whose groups need no mask,
then the masked one. ``tables`` says what a list holds, ``work`` what a program does. The units of a group are
fetched a step ahead: Triton overlaps loads with products only where no address is loaded in the same step.

Tensors are (B, heads, T, D), contiguous along D. Offsets are 64 bits wide: 512K tokens of 32 heads of 128 are
2^31 numbers. Sums and statistics are fp32, and fp32 operands are multiplied as such ("ieee"): TF32 would keep
10 bits of their 23. A document's end is a mask on what a program owns; on the other side, where lists reach
past it:

    keys of a full list         end where the tile's first query is, or before
    keys of a masked list       read as 0; the triangle masks them for every query that is stored
    queries of either list      read as 0, as are do, lse and delta: then s = 0, p = 1, dp = 0 and ds = 0, so
                                that p^T do and ds^T q add nothing, and no score needs a mask for it

What the last rule leaves in rows of the owned side past the end (or of its padding) stays in those rows.
"""

import triton
import triton.language as tl

from sparse_llama.attention.triton_parts import (
    bits_of,
    offset_of,
    read_rows,
    sees_by,
    statistics_of,
    tokens_of,
    write_rows,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SLOT_ROWS = 16
"""Keys that one program of ``add_partials`` adds."""


@triton.jit
def _add_keys(sums, total, peak, q, key, value, strides, tokens, is_real, sees, scale, WIDTH, PADDED):
    """Return the running sum of p v, its denominator and the largest score after one more group of keys."""
    k = read_rows(key, tokens, strides[0], is_real, WIDTH, PADDED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if sees is None:
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        zero = new_peak
    else:
        scores = tl.where(sees, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        zero = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a query that has seen no key so far
    p = tl.exp2(scores * scale - zero[:, None])
    shrink = tl.exp2(peak - zero)
    v = read_rows(value, tokens, strides[1], is_real, WIDTH, PADDED)
    sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
    return sums, total * shrink + tl.sum(p, 1), new_peak


@triton.jit(do_not_specialize=["num_tiles", "num_tokens", "group_size"])
def forward(
    query,
    key,
    value,
    output,
    lse,
    items,
    full,
    masked,
    head_patterns,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    scaling,
    num_tiles,
    num_tokens,
    group_size,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    ROW_UNIT: tl.constexpr,
):
    """Write output and lse of a tile of queries of one head; ``group_size`` heads share a key/value head."""
    item, head = items + 4 * tl.program_id(0), tl.program_id(1)
    row, first, length, tile = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    query += offset_of(query_strides, row, head, first)
    key += offset_of(key_strides, row, head // group_size, first)
    value += offset_of(value_strides, row, head // group_size, first)
    output += offset_of(output_strides, row, head, first)
    lse += statistics_of(row, head, first, tl.num_programs(1), num_tokens)

    own = tile * QUERIES + tl.arange(0, QUERIES)
    is_own = own < length
    q = read_rows(query, own, query_strides[2], is_own, WIDTH, PADDED)
    strides = (key_strides[2], value_strides[2])
    scale = scaling * LOG2_E  # positive, so that the largest score may be taken before scaling
    sums = tl.zeros([QUERIES, PADDED], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    line = tl.load(head_patterns + head) * num_tiles + tile
    first_group, last_group = tl.load(full[0] + line), tl.load(full[0] + line + 1)
    tokens = tokens_of(full[1], first_group, KEYS, KEY_UNIT)
    for group in range(first_group, last_group):
        following = tokens_of(full[1], group + 1, KEYS, KEY_UNIT)
        sums, total, peak = _add_keys(
            sums, total, peak, q, key, value, strides, tokens, None, None, scale, WIDTH, PADDED
        )
        tokens = following
    first_group, last_group = tl.load(masked[0] + line), tl.load(masked[0] + line + 1)
    tokens, words = (
        tokens_of(masked[1], first_group, KEYS, KEY_UNIT),
        bits_of(masked[2], first_group, KEYS, KEY_UNIT),
    )
    for group in range(first_group, last_group):
        following = tokens_of(masked[1], group + 1, KEYS, KEY_UNIT)
        following_words = bits_of(masked[2], group + 1, KEYS, KEY_UNIT)
        sees = sees_by(words, QUERIES, ROW_UNIT) & (own[:, None] >= tokens[None, :])
        sums, total, peak = _add_keys(
            sums, total, peak, q, key, value, strides, tokens, tokens < length, sees, scale, WIDTH, PADDED
        )
        tokens, words = following, following_words
    total = tl.where(total == 0.0, 1.0, total)  # only past the end: a token sees itself
    write_rows(output, own, output_strides[2], is_own, sums / total[:, None], WIDTH, PADDED)
    tl.store(lse + own, (peak + tl.log2(total)) * LN_2, mask=is_own)


@triton.jit
def _add_keys_gradient(
    sums, q, do, lse, delta, key, value, strides, tokens, is_real, sees, scale, WIDTH, PADDED
):
    """Return the running sum of ds k after one more group of keys."""
    k = read_rows(key, tokens, strides[0], is_real, WIDTH, PADDED)
    v = read_rows(value, tokens, strides[1], is_real, WIDTH, PADDED)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
    if sees is not None:
        p = tl.where(sees, p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, sums, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tiles", "num_tokens", "group_size"])
def grad_query(
    query,
    key,
    value,
    grad,
    lse,
    delta,
    result,
    items,
    full,
    masked,
    head_patterns,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    result_strides,
    scaling,
    num_tiles,
    num_tokens,
    group_size,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    ROW_UNIT: tl.constexpr,
):
    """Write the gradient of one tile of queries of one head."""
    item, head = items + 4 * tl.program_id(0), tl.program_id(1)
    row, first, length, tile = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    query += offset_of(query_strides, row, head, first)
    key += offset_of(key_strides, row, head // group_size, first)
    value += offset_of(value_strides, row, head // group_size, first)
    grad += offset_of(grad_strides, row, head, first)
    result += offset_of(result_strides, row, head, first)
    statistics = statistics_of(row, head, first, tl.num_programs(1), num_tokens)

    own = tile * QUERIES + tl.arange(0, QUERIES)
    is_own = own < length
    q = read_rows(query, own, query_strides[2], is_own, WIDTH, PADDED)
    do = read_rows(grad, own, grad_strides[2], is_own, WIDTH, PADDED)
    own_lse = tl.load(lse + statistics + own, mask=is_own, other=0.0) * LOG2_E
    own_delta = tl.load(delta + statistics + own, mask=is_own, other=0.0)
    strides, scale = (key_strides[2], value_strides[2]), scaling * LOG2_E
    sums = tl.zeros([QUERIES, PADDED], tl.float32)
    line = tl.load(head_patterns + head) * num_tiles + tile
    first_group, last_group = tl.load(full[0] + line), tl.load(full[0] + line + 1)
    tokens = tokens_of(full[1], first_group, KEYS, KEY_UNIT)
    for group in range(first_group, last_group):
        following = tokens_of(full[1], group + 1, KEYS, KEY_UNIT)
        sums = _add_keys_gradient(
            sums, q, do, own_lse, own_delta, key, value, strides, tokens, None, None, scale, WIDTH, PADDED
        )
        tokens = following
    first_group, last_group = tl.load(masked[0] + line), tl.load(masked[0] + line + 1)
    tokens, words = (
        tokens_of(masked[1], first_group, KEYS, KEY_UNIT),
        bits_of(masked[2], first_group, KEYS, KEY_UNIT),
    )
    for group in range(first_group, last_group):
        following = tokens_of(masked[1], group + 1, KEYS, KEY_UNIT)
        following_words = bits_of(masked[2], group + 1, KEYS, KEY_UNIT)
        sees = sees_by(words, QUERIES, ROW_UNIT) & (own[:, None] >= tokens[None, :])
        real = tokens < length
        sums = _add_keys_gradient(
            sums, q, do, own_lse, own_delta, key, value, strides, tokens, real, sees, scale, WIDTH, PADDED
        )
        tokens, words = following, following_words
    write_rows(result, own, result_strides[2], is_own, sums * scaling, WIDTH, PADDED)


@triton.jit
def _add_queries(dk, dv, k, v, query, grad, lse, delta, strides, tokens, length, sees, scale, WIDTH, PADDED):
    """Return the running sums of ds^T q and p^T do after one more group of queries."""
    is_real = tokens < length
    q = read_rows(query, tokens, strides[0], is_real, WIDTH, PADDED)
    do = read_rows(grad, tokens, strides[1], is_real, WIDTH, PADDED)
    row_lse = tl.load(lse + tokens, mask=is_real, other=0.0) * LOG2_E
    row_delta = tl.load(delta + tokens, mask=is_real, other=0.0)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - row_lse[None, :])
    if sees is not None:
        p = tl.where(sees, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - row_delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "group_size", "num_each"])
def grad_key_value(
    query,
    key,
    value,
    grad,
    lse,
    delta,
    result_key,
    result_value,
    partial_key,
    partial_value,
    items,
    item_starts,
    key_units,
    full,
    masked,
    head_patterns,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    result_strides,
    scaling,
    num_tokens,
    num_slots,
    group_size,
    num_each,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    QUERY_UNIT: tl.constexpr,
):
    """Write the gradients of one tile of keys, or one chunk's part of them, over ``num_each`` query heads.

    ``num_each`` is ``group_size``, or 1 where heads of a group have different patterns; then every query head
    has results of its own. Nothing is hoisted out of the loops: what three nested loops have in common is
    more than the registers hold (160 bytes of spills become none: sm_90, width 128).
    """
    head = tl.program_id(1)
    pattern = tl.load(head_patterns + head * num_each)
    work = tl.load(item_starts + pattern) + tl.program_id(0)
    if work >= tl.load(item_starts + pattern + 1):
        return
    item = items + 9 * work.to(tl.int64)
    row, first, length, line = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    first_full, last_full = tl.load(item + 4), tl.load(item + 5)
    first_masked, last_masked, slot = tl.load(item + 6), tl.load(item + 7), tl.load(item + 8)
    kv_head = head * num_each // group_size
    key += offset_of(key_strides, row, kv_head, first)
    value += offset_of(value_strides, row, kv_head, first)

    own = tokens_of(key_units, line, KEYS, KEY_UNIT)
    is_own = own < length
    k = read_rows(key, own, key_strides[2], is_own, WIDTH, PADDED)
    v = read_rows(value, own, value_strides[2], is_own, WIDTH, PADDED)
    dk = tl.zeros([KEYS, PADDED], tl.float32)
    dv = tl.zeros([KEYS, PADDED], tl.float32)
    strides, scale = (query_strides[2], grad_strides[2]), scaling * LOG2_E
    for index in tl.range(num_each, disable_licm=True):  # type: ignore[reportGeneralTypeIssues]
        own_head = head * num_each + index
        q = query + offset_of(query_strides, row, own_head, first)
        do = grad + offset_of(grad_strides, row, own_head, first)
        rows = statistics_of(row, own_head, first, tl.num_programs(1) * num_each, num_tokens)
        tokens = tokens_of(full[1], first_full, QUERIES, QUERY_UNIT)
        for group in tl.range(first_full, last_full, disable_licm=True):  # type: ignore[reportGeneralTypeIssues]
            following = tokens_of(full[1], group + 1, QUERIES, QUERY_UNIT)
            dk, dv = _add_queries(
                dk,
                dv,
                k,
                v,
                q,
                do,
                lse + rows,
                delta + rows,
                strides,
                tokens,
                length,
                None,
                scale,
                WIDTH,
                PADDED,
            )
            tokens = following
        tokens = tokens_of(masked[1], first_masked, QUERIES, QUERY_UNIT)
        words = bits_of(masked[2], first_masked, QUERIES, QUERY_UNIT)
        for group in tl.range(first_masked, last_masked, disable_licm=True):  # type: ignore[reportGeneralTypeIssues]
            following = tokens_of(masked[1], group + 1, QUERIES, QUERY_UNIT)
            following_words = bits_of(masked[2], group + 1, QUERIES, QUERY_UNIT)
            sees = sees_by(words, KEYS, KEY_UNIT) & (own[:, None] <= tokens[None, :])
            dk, dv = _add_queries(
                dk,
                dv,
                k,
                v,
                q,
                do,
                lse + rows,
                delta + rows,
                strides,
                tokens,
                length,
                sees,
                scale,
                WIDTH,
                PADDED,
            )
            tokens, words = following, following_words
    if slot < 0:
        base = offset_of(result_strides, row, head, first)
        write_rows(result_key + base, own, result_strides[2], is_own, dk * scaling, WIDTH, PADDED)
        write_rows(result_value + base, own, result_strides[2], is_own, dv, WIDTH, PADDED)
    else:
        place = (head.to(tl.int64) * num_slots + slot) * KEYS + tl.arange(0, KEYS)
        offset = place[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
        tl.store(partial_key + offset, dk)
        tl.store(partial_value + offset, dv)


@triton.jit(do_not_specialize=["num_slots", "num_each"])
def add_partials(
    result_key,
    result_value,
    partial_key,
    partial_value,
    sums,
    sum_starts,
    key_units,
    head_patterns,
    result_strides,
    scaling,
    num_slots,
    num_each,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the gradients of ROWS keys of one tile: the sum of its slots, in order."""
    head = tl.program_id(1)
    pattern = tl.load(head_patterns + head * num_each)
    index = tl.load(sum_starts + pattern) + tl.program_id(0) // (KEYS // ROWS)
    if index >= tl.load(sum_starts + pattern + 1):
        return
    item = sums + 6 * index.to(tl.int64)
    row, first, length, line = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    within = tl.program_id(0) % (KEYS // ROWS) * ROWS + tl.arange(0, ROWS)
    first_slot, last_slot = tl.load(item + 4), tl.load(item + 5)
    place = (head.to(tl.int64) * num_slots + first_slot) * KEYS + within
    offset = place[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    dk = tl.zeros([ROWS, PADDED], tl.float32)
    dv = tl.zeros([ROWS, PADDED], tl.float32)
    for _ in range(first_slot, last_slot):
        dk += tl.load(partial_key + offset)
        dv += tl.load(partial_value + offset)
        offset += KEYS * PADDED
    own = tl.load(key_units + line * (KEYS // KEY_UNIT) + within // KEY_UNIT) * KEY_UNIT + within % KEY_UNIT
    base = offset_of(result_strides, row, head, first)
    write_rows(result_key + base, own, result_strides[2], own < length, dk * scaling, WIDTH, PADDED)
    write_rows(result_value + base, own, result_strides[2], own < length, dv, WIDTH, PADDED)
