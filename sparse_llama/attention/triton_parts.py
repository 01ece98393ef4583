"""What the Triton kernels share: how they find, read and write tokens.

A position is a row of the batch, a head and a token; strides are those of (B, heads, T), D is contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def offset_of(strides, row, head, token):
    """Return where a token of a head of a row of a (B, heads, T, D) tensor begins."""
    return row.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]


@triton.jit
def statistics_of(row, head, token, num_heads, num_tokens):
    """Return where it is in a (B, H, T) tensor of statistics."""
    return (row.to(tl.int64) * num_heads + head) * num_tokens + token


@triton.jit
def read_rows(base, tokens, stride, is_real, WIDTH, PADDED):
    """Return rows ``tokens`` as (tokens, PADDED): 0 past WIDTH and where not ``is_real``; None is all."""
    column = tl.arange(0, PADDED)
    pointers = base + tokens.to(tl.int64)[:, None] * stride + column[None, :]
    if is_real is None:
        if WIDTH == PADDED:
            rows = tl.load(pointers)  # no predicate: this is the inner loop
        else:
            rows = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        rows = tl.load(pointers, mask=is_real[:, None] & (column < WIDTH)[None, :], other=0.0)
    return rows


@triton.jit
def write_rows(base, tokens, stride, is_real, rows, WIDTH, PADDED):
    column = tl.arange(0, PADDED)
    pointers = base + tokens.to(tl.int64)[:, None] * stride + column[None, :]
    mask = is_real[:, None]
    if WIDTH != PADDED:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def tokens_of(units, group, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Return the SIZE tokens of a group of units, counted from the document's start."""
    place = tl.arange(0, SIZE)
    if SIZE == UNIT:
        tokens = tl.load(units + group) * UNIT + place
    else:
        tokens = tl.load(units + group * (SIZE // UNIT) + place // UNIT) * UNIT + place % UNIT
    return tokens


@triton.jit
def bits_of(bits, group, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Return the bits of the units of the SIZE tokens of a group."""
    place = tl.arange(0, SIZE)
    if SIZE == UNIT:
        words = tl.load(bits + group + 0 * place)
    else:
        words = tl.load(bits + group * (SIZE // UNIT) + place // UNIT)
    return words


@triton.jit
def sees_by(words, OWNED: tl.constexpr, PART: tl.constexpr):
    """Return (OWNED, tokens): whether the parts of the owned side are in the bits of the tokens' units."""
    return ((words[None, :] >> (tl.arange(0, OWNED) // PART)[:, None]) & 1) != 0
