"""The layouts that are measured.

Every mode at any length and block. Sizes are chosen in tokens, so that a mode computes about the same pairs
in blocks of 16 and of 64; density lies between 0.08 and 0.35 from 4K to 16K tokens (blocks to 64).
``T`` tokens, ``N`` blocks on a side. No torch here: a mistake is found before it is imported.
"""

import math
from collections.abc import Callable
from typing import Any

from sparse_llama.errors import ConfigError

Options = dict[str, Any]
"""A ``sparse_attention`` block."""


def layout_options(name: str, *, block: int, num_tokens: int) -> Options:
    """Return the block of the layout called ``name`` for sequences of ``num_tokens``.

    Raises:
        ConfigError: there are fewer than 8 blocks, too few for a layout to be one.
    """
    if num_tokens < 8 * block:
        raise ConfigError(
            f"--blocks: {block} is too large for --lengths {num_tokens}; use at most {num_tokens // 8}"
        )
    return _LAYOUTS[name][0](block, num_tokens) | {"block": block}


def _fixed(block: int, num_tokens: int) -> Options:
    wide = _blocks(64, block)
    local = wide * max(1, round(1024 / (wide * block)))
    return _causal("fixed", num_local_blocks=local, num_global_blocks=wide)


def _deepspeed_default(block: int, num_tokens: int) -> Options:
    return _causal("fixed", num_local_blocks=4, num_global_blocks=1)


def _variable(block: int, num_tokens: int) -> Options:
    return _causal(
        "variable",
        local_window_blocks=[_blocks(num_tokens / share, block) for share in (32, 16, 8)],
        global_block_indices=[0],
        global_block_end_indices=[_blocks(64, block)],
    )


def _bigbird(block: int, num_tokens: int) -> Options:
    return _causal(
        "bigbird",
        num_sliding_window_blocks=_window(num_tokens / 22, block),
        num_global_blocks=_blocks(64, block),
        num_random_blocks=2,
    )


def _bslongformer(block: int, num_tokens: int) -> Options:
    return _causal(
        "bslongformer",
        num_sliding_window_blocks=_window(num_tokens / 20, block),
        global_block_indices=[0],
        global_block_end_indices=[_blocks(64, block)],
    )


def _local_sliding_window(block: int, num_tokens: int) -> Options:
    return _causal("local_sliding_window", num_sliding_window_blocks=_window(num_tokens / 18, block))


def _strided(block: int, num_tokens: int) -> Options:
    return {"mode": "strided", "stride": max(2, math.isqrt(num_tokens // block // 2))}


def _s2(block: int, num_tokens: int) -> Options:
    return {"mode": "s2", "group_blocks": num_tokens // block // 8 * 2}


_LAYOUTS: dict[str, tuple[Callable[[int, int], Options], str]] = {
    "fixed": (_fixed, "windows of 1,024 tokens, the last 64 of each seen from everywhere after them"),
    "deepspeed_default": (
        _deepspeed_default,
        "`fixed` as it was without options: windows of 4 blocks, the last of each global",
    ),
    "variable": (_variable, "windows of T / 32, T / 16, then T / 8 tokens, the first 64 tokens global"),
    "bigbird": (
        _bigbird,
        "a window of T / 22 tokens back, the first 64 tokens global, 2 random blocks a row",
    ),
    "bslongformer": (_bslongformer, "a window of T / 20 tokens back, the first 64 tokens global"),
    "local_sliding_window": (_local_sliding_window, "a window of T / 18 tokens back"),
    "strided": (_strided, "the stride of fewest pairs, about sqrt(N / 2) blocks"),
    "s2": (_s2, "groups of T / 4 tokens, shifted by half a group in half of the heads"),
}
LAYOUT_NAMES = tuple(_LAYOUTS)
"""The modes, and DeepSpeed's default of ``fixed``."""


def describe_layout(name: str) -> str:
    """Return what the layout called ``name`` is, in tokens of a sequence of T."""
    return _LAYOUTS[name][1]


def _causal(mode: str, **options: Any) -> Options:
    return {"mode": mode, **options, "attention": "unidirectional"}


def _blocks(tokens: float, block: int) -> int:
    return max(1, round(tokens / block))


def _window(tokens: float, block: int) -> int:
    """Return the width of a window, both sides and the block itself, that reaches ``tokens`` back."""
    return 2 * _blocks(tokens, block) + 1
