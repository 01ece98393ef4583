"""GPT-NeoX's way to ask for sparse attention, placed in the ``sparse_attention`` block.

    {"sparsity_config": {"block": 16, "num_local_blocks": 4},
     "attention_config": [[["global", "sparse_fixed"], 16]]}

NeoX names a type of attention for every layer, repeated patterns written [[types], times], and one set of
options that each type reads its own keys of (``configure_sparse_attention`` in ``megatron/model/utils.py``,
``expand_attention_types`` in ``megatron/utils.py``). Its layouts are always unidirectional, and its
``num_random_blocks`` is 1 where ``bigbird`` names none.
"""

from collections.abc import Mapping
from typing import Any

from sparse_llama.config.section import join_path, show, suggest
from sparse_llama.errors import ConfigError

DENSE_TYPES = ("global", "flash")
KEYS = ("sparsity_config", "attention_config")
_PATH = "sparse_attention.attention_config"
_PER_HEAD = ("block", "different_layout_per_head")
_RANGES = ("global_block_indices", "global_block_end_indices")
_OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sparse_fixed": (
        "fixed",
        (*_PER_HEAD, "num_local_blocks", "num_global_blocks", "num_different_global_patterns"),
    ),
    "sparse_variable": ("variable", (*_PER_HEAD, "num_random_blocks", "local_window_blocks", *_RANGES)),
    "local": ("local_sliding_window", ("block",)),
    "bigbird": (
        "bigbird",
        (*_PER_HEAD, "num_random_blocks", "num_sliding_window_blocks", "num_global_blocks"),
    ),
    "bslongformer": ("bslongformer", (*_PER_HEAD, "num_sliding_window_blocks", *_RANGES)),
}
"""The mode of each type, and the options that it reads."""
_UNREAD = ("mode", "attention", "horizontal_global_attention")
"""Options that NeoX documents and reads nowhere: types have modes, its layouts are unidirectional, without
global rows."""


def unread_options(block: Mapping[str, Any]) -> list[str]:
    """Return the options in a block that no type reads."""
    return [key for key in check_options(block.get("sparsity_config")) if key in _UNREAD]


def is_neox(block: Mapping[str, Any]) -> bool:
    """Return whether a ``sparse_attention`` block is written as GPT-NeoX does."""
    return any(key in block for key in KEYS)


def neox_types(block: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """Return the types of layers 0, 1, ... and how many layers there are; None: the types repeat to the last.

    Raises:
        ConfigError: it is no such list.
    """
    for key in block:
        if key not in KEYS:
            raise ConfigError(
                f"{join_path('sparse_attention', key)}: does not go with {' and '.join(KEYS)}"
                f"{suggest(key, KEYS)}"
            )
    config = block.get("attention_config")
    example = 'such as [[["global", "sparse_fixed"], 16]]'
    if not isinstance(config, list | tuple) or not config:
        raise ConfigError(f"{_PATH}: must be a list of types by layer {example}, got {show(config)}")
    if all(isinstance(item, str) for item in config):
        types: list[str] = [str(item) for item in config]
        return _checked(types), len(types)
    types = []
    for item in config:
        is_pair = isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], list | tuple)
        if not is_pair or not item[0]:
            raise ConfigError(f"{_PATH}: must hold pairs [[types], times] {example}, got {show(item)}")
        names, times = item
        if times == "all":
            if len(config) > 1:
                raise ConfigError(f'{_PATH}: "all" repeats its types in every layer; leave the others out')
            return _checked(list(names)), None
        if type(times) is not int or times < 1:
            raise ConfigError(f'{_PATH}: types repeat "all" or a number of times, got {show(times)}')
        types += list(names) * times
    return _checked(types), len(types)


def neox_block(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sparse type's block as DeepSpeed writes it; ``options`` are NeoX's ``sparsity_config``."""
    mode, names = _OPTIONS[kind]
    block: dict[str, Any] = {"mode": mode, "attention": "unidirectional"}
    block |= {name: options[name] for name in names if name in options}
    if kind == "local":
        sliding = options.get("num_sliding_window_blocks", 4)
        block["num_sliding_window_blocks"] = options.get("num_local_blocks", sliding)
    if kind == "bigbird":
        block.setdefault("num_random_blocks", 1)
    return block


def check_options(options: object) -> Mapping[str, Any]:
    """Return NeoX's ``sparsity_config``.

    Raises:
        ConfigError: it is no object, or has a key that no type reads.
    """
    path = "sparse_attention.sparsity_config"
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ConfigError(f"{path}: must be an object, got {show(options)}")
    known = {name for _, names in _OPTIONS.values() for name in names} | set(_UNREAD)
    for key in options:
        if key not in known:
            raise ConfigError(f"{join_path(path, key)}: unknown key{suggest(str(key), sorted(known))}")
    return options


def _checked(types: list[Any]) -> list[str]:
    allowed = (*DENSE_TYPES, *_OPTIONS)
    for kind in types:
        if kind not in allowed:
            raise ConfigError(
                f"{_PATH}: {show(kind)} is no attention that a LLaMA has here; allowed: {', '.join(allowed)}"
            )
    return types
