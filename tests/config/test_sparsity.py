"""The ``sparse_attention`` block has DeepSpeed's historical schema, mode by mode."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_llama.config.sparsity import MODES, parse_sparsity
from sparse_llama.errors import ConfigError

SCHEMA: dict[str, dict[str, Any]] = {
    "dense": {},
    "fixed": {
        "num_local_blocks": 4,
        "num_global_blocks": 1,
        "attention": "bidirectional",
        "horizontal_global_attention": False,
        "num_different_global_patterns": 1,
    },
    "variable": {
        "num_random_blocks": 0,
        "local_window_blocks": (4,),
        "global_block_indices": (0,),
        "global_block_end_indices": None,
        "attention": "bidirectional",
        "horizontal_global_attention": False,
    },
    "bigbird": {
        "num_random_blocks": 0,
        "num_sliding_window_blocks": 3,
        "num_global_blocks": 1,
        "attention": "bidirectional",
    },
    "bslongformer": {
        "num_sliding_window_blocks": 3,
        "global_block_indices": (0,),
        "global_block_end_indices": None,
        "attention": "bidirectional",
    },
    "local_sliding_window": {"num_sliding_window_blocks": 3, "attention": "unidirectional"},
}
"""Keys and defaults of DeepSpeed's JSON parser (0.19.6: ``runtime/config.py``, ``SPARSE_*_DEFAULT`` of
``runtime/constants.py``) beside ``mode``, ``block`` 16 and, but for ``local_sliding_window``,
``different_layout_per_head`` false; ``attention`` of the last three modes from the classes' signatures."""


@pytest.mark.parametrize("mode", SCHEMA)
def test_a_mode_has_the_keys_and_defaults_that_deepspeed_had(mode: str):
    per_head = {} if mode == "local_sliding_window" else {"different_layout_per_head": False}
    expected = {"mode": mode, "block": 16} | per_head | SCHEMA[mode]
    assert parse_sparsity({"mode": mode}).model_dump() == expected


def test_deepspeed_had_six_modes_and_a_block_without_one_is_fixed():
    assert list(MODES) == [*SCHEMA, "strided", "s2", "mask"]
    assert parse_sparsity({"num_local_blocks": 8}).mode == "fixed"


EVERY_KEY = {
    "block": 16,
    "different_layout_per_head": True,
    "num_local_blocks": 4,
    "num_global_blocks": 1,
    "attention": "bidirectional",
    "horizontal_global_attention": False,
    "num_different_global_patterns": 4,
    "num_random_blocks": 0,
    "local_window_blocks": [4],
    "global_block_indices": [0],
    "global_block_end_indices": None,
    "num_sliding_window_blocks": 3,
}
"""The example of DeepSpeed's documentation (config-json, "Sparse Attention"), where ``mode`` is ``fixed``."""


@pytest.mark.parametrize("mode", SCHEMA)
def test_keys_of_other_modes_are_passed_over_as_deepspeed_did(load, mode: str):
    sparsity = parse_sparsity({"mode": mode} | EVERY_KEY)
    own = {key: value for key, value in EVERY_KEY.items() if key in SCHEMA[mode] or key == "block"}
    if mode != "local_sliding_window":
        own["different_layout_per_head"] = True
    assert sparsity == parse_sparsity({"mode": mode} | own)
    run = load({"sparse_attention": {"mode": mode} | EVERY_KEY})
    assert run.layouts.default == sparsity
    unread = [key for key in EVERY_KEY if key not in own and EVERY_KEY[key] is not None]
    assert (
        f"sparse_attention: no effect of {', '.join(unread)}; mode {mode!r} does not read them" in run.notices
    )


@pytest.mark.real_data
def test_every_layout_that_deepspeed_computed_can_be_asked_for(shared: Path):
    with np.load(shared / "golden" / "deepspeed_layouts.npz") as golden:
        cases = json.loads(str(golden["cases"]))
    assert {case["mode"] for case in cases} == set(SCHEMA)
    for case in cases:
        parsed = parse_sparsity({"mode": case["mode"], "block": case["block"]} | case["options"])
        held = parsed.model_dump(mode="json")
        assert held.items() >= case["options"].items()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mode": "fixd"}, "mode: no mode is called 'fixd'; did you mean 'fixed'?"),
    (
        {"mode": 5},
        "mode: no mode is called 5; allowed: dense, fixed, variable, bigbird, bslongformer, "
        "local_sliding_window, strided, s2, mask",
    ),
    (
        {"mode": "strided", "stride": 3, "num_sliding_window_blocks": 3},
        "num_sliding_window_blocks: no key of mode 'strided'; it belongs to bigbird, bslongformer, "
        "local_sliding_window",
    ),
    (
        {"mode": "dense", "group_blocks": 4},
        "group_blocks: no key of mode 'dense'; it belongs to s2",
    ),
    ({"num_local_block": 3}, "num_local_block: unknown key; did you mean 'num_local_blocks'?"),
    ({"block": 0}, "block: must be >= 1, got 0"),
    ({"block": 16.0}, "block: must be an integer, got 16.0"),
    ({"attention": "causal"}, "attention: must be 'bidirectional' or 'unidirectional', got \"causal\""),
    (
        {"mode": "variable", "local_window_blocks": []},
        "local_window_blocks: must have at least 1 entry, got []",
    ),
    ({"mode": "variable", "local_window_blocks": [4, 0]}, "local_window_blocks[1]: must be >= 1, got 0"),
    ({"mode": "variable", "local_window_blocks": 4}, "local_window_blocks: must be a list, got 4"),
    ({"mode": "strided"}, "stride: missing; this key is required"),
    ({"mode": "strided", "stride": 0}, "stride: must be >= 1, got 0"),
    ({"mode": "s2"}, "group_blocks: missing; this key is required"),
    (
        {"mode": "s2", "group_blocks": 5},
        "group_blocks: must be even, for half a group to be blocks; got 5, use 4 or 6",
    ),
    ({"mode": "s2", "group_blocks": 1}, "group_blocks: must be >= 2, got 1"),
    ({"mode": "fixed", "stride": 8}, "stride: no key of mode 'fixed'; it belongs to strided"),
    ({"mode": "mask", "path": ""}, 'path: must have at least 1 entry, got ""'),
]
CONFLICTS: list[tuple[dict[str, Any], str]] = [
    (
        {"num_local_blocks": 4, "num_global_blocks": 3},
        "num_local_blocks (4) must be a multiple of num_global_blocks (3)",
    ),
    (
        {"attention": "unidirectional", "horizontal_global_attention": True},
        'horizontal_global_attention: true needs attention: "bidirectional"',
    ),
    (
        {"mode": "variable", "attention": "unidirectional", "horizontal_global_attention": True},
        'horizontal_global_attention: true needs attention: "bidirectional"',
    ),
    (
        {"num_different_global_patterns": 2},
        "num_different_global_patterns (2) > 1 needs different_layout_per_head: true",
    ),
    (
        {"num_different_global_patterns": 5, "different_layout_per_head": True},
        "num_different_global_patterns (5) must be at most num_local_blocks / num_global_blocks (4 / 1 = 4)",
    ),
    (
        {"mode": "variable", "global_block_indices": [0, 9], "global_block_end_indices": [2]},
        "global_block_indices (2 of them) and global_block_end_indices (1) must be equally many",
    ),
    (
        {"mode": "bslongformer", "global_block_indices": [5], "global_block_end_indices": [5]},
        "a global range starts at 5 and ends before 5; the start must be smaller",
    ),
]


@pytest.mark.parametrize(
    ("block", "line"),
    [(block, f"sparse_attention.{line}") for block, line in REFUSED]
    + [(block, f"sparse_attention: {line}") for block, line in CONFLICTS],
    ids=lambda value: value[17:60] if isinstance(value, str) else "",
)
def test_a_wrong_block_is_refused_in_one_line(refusal, block: dict[str, Any], line: str):
    with pytest.raises(ConfigError) as refused:
        parse_sparsity(block)
    assert str(refused.value) == line
    assert refusal({"sparse_attention": block}) == line
