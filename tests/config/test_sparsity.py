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


def test_there_are_six_modes_and_a_block_without_one_is_fixed():
    assert MODES.keys() == SCHEMA.keys()
    assert parse_sparsity({"num_local_blocks": 8}).mode == "fixed"


@pytest.mark.real_data
def test_every_layout_that_deepspeed_computed_can_be_asked_for(shared: Path):
    with np.load(shared / "golden" / "deepspeed_layouts.npz") as golden:
        cases = json.loads(str(golden["cases"]))
    assert {case["mode"] for case in cases} == set(MODES)
    for case in cases:
        parsed = parse_sparsity({"mode": case["mode"], "block": case["block"]} | case["options"])
        held = parsed.model_dump(mode="json")
        assert held.items() >= case["options"].items()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mode": "fixd"}, "mode: no mode is called 'fixd'; did you mean 'fixed'?"),
    (
        {"mode": 5},
        "mode: no mode is called 5; allowed: dense, fixed, variable, bigbird, bslongformer, "
        "local_sliding_window",
    ),
    (
        {"mode": "fixed", "num_sliding_window_blocks": 3},
        "num_sliding_window_blocks: no key of mode 'fixed'; it belongs to bigbird, bslongformer, "
        "local_sliding_window",
    ),
    (
        {"mode": "dense", "horizontal_global_attention": True},
        "horizontal_global_attention: no key of mode 'dense'; it belongs to fixed, variable",
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
