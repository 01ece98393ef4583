"""The ``sparse_attention`` block: DeepSpeed's historical schema, one class per mode.

Keys and defaults are those of DeepSpeed's JSON parser up to 0.19.6 (``get_sparse_attention`` in
``runtime/config.py``), refusals those of its classes (``ops/sparse_attention/sparsity_config.py``). The two
agree on every default but one: a ``bigbird`` block without ``num_random_blocks`` had none, a
``BigBirdSparsityConfig()`` made in code had 1. Two differences: ``attention`` works in every mode that has a
direction (the parser dropped it for ``bigbird`` and ``bslongformer``), and ``local_sliding_window``, which
existed in code only, can be asked for at all. A mode does not read the keys of another: the example in
DeepSpeed's documentation has those of all modes, and must run; a notice names them.

Three modes DeepSpeed never had: ``strided``, ``s2`` and ``mask``. No old block has their keys, so a key of
theirs elsewhere, or another's in theirs, is a mistake.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparse_llama.config.section import FrozenList, Section, quote, suggest
from sparse_llama.errors import ConfigError

Attention = Literal["bidirectional", "unidirectional"]
BlockSizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], FrozenList, Field(min_length=1)]
BlockIndices = Annotated[tuple[int, ...], FrozenList]
"""Block numbers; as in DeepSpeed, a negative one counts from the end of the master layout."""


class _Mode(Section):
    block: int = Field(default=16, ge=1, le=2**20)
    """Tokens on a side of a block."""

    def num_blocks_needed(self) -> tuple[str, int]:
        """Return the key that asks for most blocks, and how many; a shorter master layout cannot be made."""
        return "block", 1


class _PerHead(_Mode):
    different_layout_per_head: bool = False
    """Whether heads may have layouts of their own."""


class DenseSparsity(_PerHead):
    """Every block sees every block."""

    mode: Literal["dense"] = "dense"


class FixedSparsity(_PerHead):
    """Windows of ``num_local_blocks``, whose last blocks are seen from everywhere after them (Child et al.
    2019)."""

    mode: Literal["fixed"] = "fixed"
    num_local_blocks: int = Field(default=4, ge=1)
    num_global_blocks: int = Field(default=1, ge=1)
    attention: Attention = "bidirectional"
    horizontal_global_attention: bool = False
    num_different_global_patterns: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        local, in_window, patterns = (
            self.num_local_blocks,
            self.num_global_blocks,
            self.num_different_global_patterns,
        )
        if local % in_window != 0:
            raise ValueError(
                f"num_local_blocks ({local}) must be a multiple of num_global_blocks ({in_window})"
            )
        _check_horizontal(self.attention, self.horizontal_global_attention)
        if patterns > 1 and not self.different_layout_per_head:
            raise ValueError(
                f"num_different_global_patterns ({patterns}) > 1 needs different_layout_per_head: true"
            )
        if patterns > local // in_window:
            raise ValueError(
                f"num_different_global_patterns ({patterns}) must be at most num_local_blocks / "
                f"num_global_blocks ({local} / {in_window} = {local // in_window})"
            )
        return self


class VariableSparsity(_PerHead):
    """Windows of given sizes (the last one repeats), given global blocks, random blocks."""

    mode: Literal["variable"] = "variable"
    num_random_blocks: int = Field(default=0, ge=0)
    local_window_blocks: BlockSizes = (4,)
    global_block_indices: BlockIndices = (0,)
    global_block_end_indices: BlockIndices | None = None
    attention: Attention = "bidirectional"
    horizontal_global_attention: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        _check_ranges(self.global_block_indices, self.global_block_end_indices)
        _check_horizontal(self.attention, self.horizontal_global_attention)
        return self

    def num_blocks_needed(self) -> tuple[str, int]:
        backwards = "global_block_indices", _reach(self.global_block_indices, self.global_block_end_indices)
        return max(("num_random_blocks", self.num_random_blocks), backwards, key=lambda pair: pair[1])


class BigBirdSparsity(_PerHead):
    """A sliding window, the first blocks global, random blocks (Zaheer et al. 2020, arXiv:2007.14062)."""

    mode: Literal["bigbird"] = "bigbird"
    num_random_blocks: int = Field(default=0, ge=0)
    num_sliding_window_blocks: int = Field(default=3, ge=1)
    num_global_blocks: int = Field(default=1, ge=0)
    attention: Attention = "bidirectional"

    def num_blocks_needed(self) -> tuple[str, int]:
        names = ("num_sliding_window_blocks", "num_random_blocks", "num_global_blocks")
        return max(((name, getattr(self, name)) for name in names), key=lambda pair: pair[1])


class BSLongformerSparsity(_PerHead):
    """A sliding window and given global blocks (Beltagy et al. 2020, arXiv:2004.05150)."""

    mode: Literal["bslongformer"] = "bslongformer"
    num_sliding_window_blocks: int = Field(default=3, ge=1)
    """Blocks of the window, counting the block itself: n // 2 on each side."""
    global_block_indices: BlockIndices = (0,)
    global_block_end_indices: BlockIndices | None = None
    attention: Attention = "bidirectional"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        _check_ranges(self.global_block_indices, self.global_block_end_indices)
        return self

    def num_blocks_needed(self) -> tuple[str, int]:
        window = "num_sliding_window_blocks", self.num_sliding_window_blocks
        backwards = "global_block_indices", _reach(self.global_block_indices, self.global_block_end_indices)
        return max(window, backwards, key=lambda pair: pair[1])


class LocalSlidingWindowSparsity(_Mode):
    """A sliding window and nothing else; unidirectional unless asked otherwise, as DeepSpeed's class was."""

    mode: Literal["local_sliding_window"] = "local_sliding_window"
    num_sliding_window_blocks: int = Field(default=3, ge=1)
    attention: Attention = "unidirectional"

    def num_blocks_needed(self) -> tuple[str, int]:
        return "num_sliding_window_blocks", self.num_sliding_window_blocks


class StridedSparsity(_Mode):
    """The ``stride`` blocks up to a block's own, and every ``stride``-th before it (Child et al. 2019,
    arXiv:1904.10509, section 4.2): block i sees j where i - j < stride or (i - j) mod stride = 0."""

    mode: Literal["strided"] = "strided"
    stride: int = Field(ge=1)
    attention: Attention = "unidirectional"


class S2Sparsity(_Mode):
    """Groups of ``group_blocks`` that see themselves; the later half of the heads shifts them by half a group
    (LongLoRA, Chen et al. 2024, arXiv:2309.12307, section 3.2).

    Shifted groups do not wrap around: the first and the last half group stand alone, so that no token sees a
    later one. Of an odd number of heads the middle one is shifted, as in LongLoRA.
    """

    mode: Literal["s2"] = "s2"
    group_blocks: int = Field(ge=2)
    attention: Attention = "unidirectional"

    @field_validator("group_blocks")
    @classmethod
    def _has_halves(cls, blocks: int) -> int:
        if blocks % 2:
            raise ValueError(
                f"must be even, for half a group to be blocks; got {blocks}, use {blocks - 1} or {blocks + 1}"
            )
        return blocks


class MaskSparsity(_Mode):
    """A table of which block sees which, read from a file."""

    mode: Literal["mask"] = "mask"
    path: str = Field(min_length=1)
    """Of a .npy file, (N, N) or (H, N, N) bool, from the working directory; or what ``pack_mask`` made of it,
    which an adapter keeps."""


Sparsity = (
    DenseSparsity
    | FixedSparsity
    | VariableSparsity
    | BigBirdSparsity
    | BSLongformerSparsity
    | LocalSlidingWindowSparsity
    | StridedSparsity
    | S2Sparsity
    | MaskSparsity
)
MODES: dict[str, type[Sparsity]] = {
    "dense": DenseSparsity,
    "fixed": FixedSparsity,
    "variable": VariableSparsity,
    "bigbird": BigBirdSparsity,
    "bslongformer": BSLongformerSparsity,
    "local_sliding_window": LocalSlidingWindowSparsity,
    "strided": StridedSparsity,
    "s2": S2Sparsity,
    "mask": MaskSparsity,
}


_DEEPSPEEDS = ("dense", "fixed", "variable", "bigbird", "bslongformer", "local_sliding_window")


def parse_sparsity(block: Mapping[str, Any]) -> Sparsity:
    """Return the block as the class of its ``mode``; a block without one is ``fixed``, as DeepSpeed had it.

    Raises:
        ConfigError: in one line, which key is wrong, what was found, and what is allowed.
    """
    if not isinstance(block, Mapping):
        raise ConfigError('sparse_attention: must be an object such as {"mode": "fixed"}')
    mode = block.get("mode", "fixed")
    if not isinstance(mode, str) or mode not in MODES:
        hint = suggest(mode, MODES) if isinstance(mode, str) else f"; allowed: {', '.join(MODES)}"
        raise ConfigError(f"sparse_attention.mode: no mode is called {quote(mode)}{hint}")
    cls, unread = MODES[mode], unread_keys(block)
    for key in sorted(set(map(str, block)) - set(cls.model_fields) - set(unread)):
        homes = [name for name, other in MODES.items() if key in other.model_fields]
        if homes:
            raise ConfigError(
                f"sparse_attention.{key}: no key of mode {mode!r}; it belongs to {', '.join(homes)}"
            )
    read = {key: value for key, value in block.items() if key not in unread}
    return cls.parse(read, "sparse_attention")


def unread_keys(block: Mapping[str, Any]) -> list[str]:
    """Return the keys of DeepSpeed's other modes, which one of DeepSpeed's modes passes over."""
    mode = block.get("mode", "fixed")
    if mode not in _DEEPSPEEDS:
        return []
    known = {key for name in _DEEPSPEEDS for key in MODES[name].model_fields}
    return [key for key in block if key in known - set(MODES[mode].model_fields)]


def _reach(starts: tuple[int, ...], ends: tuple[int, ...] | None) -> int:
    """Return how many blocks single global ones count back from the end; ranges are cut where none is."""
    return 0 if ends is not None else -min((0, *starts))


def _check_horizontal(attention: str, horizontal: bool) -> None:
    if horizontal and attention != "bidirectional":
        raise ValueError('horizontal_global_attention: true needs attention: "bidirectional"')


def _check_ranges(starts: tuple[int, ...], ends: tuple[int, ...] | None) -> None:
    if ends is None:
        return
    if len(starts) != len(ends):
        raise ValueError(
            f"global_block_indices ({len(starts)} of them) and global_block_end_indices ({len(ends)}) must "
            "be equally many"
        )
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise ValueError(
                f"a global range starts at {start} and ends before {end}; the start must be smaller"
            )
