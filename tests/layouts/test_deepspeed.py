"""Thousands of random options against DeepSpeed's own classes, the last that there are: every bit, random
blocks too, and what is refused.

    pytest -m slow tests/layouts/test_deepspeed.py

downloads DeepSpeed 0.19.6 and runs one file of it, ``sparsity_config.py``, which needs nothing but torch.
"""

import random
import subprocess
import sys
import tarfile
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch

from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import build_layout

VERSION = "0.19.6"
NUM_BLOCKS_OF_OPTIONS = 8000
CLASSES = {
    "dense": "DenseSparsityConfig",
    "fixed": "FixedSparsityConfig",
    "variable": "VariableSparsityConfig",
    "bigbird": "BigBirdSparsityConfig",
    "bslongformer": "BSLongformerSparsityConfig",
    "local_sliding_window": "LocalSlidingWindowSparsityConfig",
}


@pytest.fixture(scope="module")
def deepspeed_layouts(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return DeepSpeed's module of layouts."""
    folder = tmp_path_factory.mktemp("deepspeed")
    command = [
        "download",
        f"deepspeed=={VERSION}",
        "--no-deps",
        "--no-build-isolation",
        "--dest",
        str(folder),
    ]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True, capture_output=True, timeout=300)
    with tarfile.open(folder / f"deepspeed-{VERSION}.tar.gz") as archive:
        member = archive.extractfile(f"deepspeed-{VERSION}/deepspeed/ops/sparse_attention/sparsity_config.py")
        assert member is not None
        source = member.read().decode()
    module = ModuleType("sparsity_config")
    exec(compile(source, "sparsity_config.py", "exec"), module.__dict__)
    return module


def draw_options(rng: random.Random) -> dict[str, Any]:
    """Return options of a mode, about every third of them none that DeepSpeed makes a layout of."""

    def indices(count: int) -> list[int]:
        return [rng.randint(-4, 14) for _ in range(count)]

    mode = rng.choice(list(CLASSES))
    count = rng.randint(1, 3)
    starts = indices(count)
    ends = [start + rng.randint(1, 4) if rng.random() < 0.9 else start for start in starts]
    choices: dict[str, Any] = {
        "attention": rng.choice(["unidirectional", "bidirectional"]),
        "different_layout_per_head": rng.random() < 0.5,
        "horizontal_global_attention": rng.random() < 0.3,
        "num_local_blocks": rng.choice([1, 2, 3, 4, 6, 8, 12]),
        "num_global_blocks": rng.choice([1, 1, 2, 3, 4]),
        "num_different_global_patterns": rng.choice([1, 1, 2, 3, 4, 9]),
        "num_random_blocks": rng.choice([0, 0, 1, 2, 5, 9]),
        "num_sliding_window_blocks": rng.choice([1, 2, 3, 4, 7, 12]),
        "local_window_blocks": [rng.randint(1, 5) for _ in range(rng.randint(1, 3))],
        "global_block_indices": starts,
        "global_block_end_indices": rng.choice([None, ends, ends[1:]]),
    }
    known = set(type(parse_sparsity({"mode": mode})).model_fields) - {"mode", "block"}
    return {"mode": mode} | {key: choices[key] for key in sorted(known) if rng.random() < 0.7}


def made_by_deepspeed(module: ModuleType, case: dict[str, Any], heads: int, blocks: int, seed: int) -> Any:
    """Return the layout as bools, or the exception."""
    options = {key: value for key, value in case.items() if key != "mode"}
    if case["mode"] == "bigbird":
        options.setdefault("num_random_blocks", 0)  # as its JSON parser had it
    random.seed(seed)
    try:
        return (
            getattr(module, CLASSES[case["mode"]])(heads, block=16, **options).make_layout(blocks * 16) == 1
        )
    except Exception as error:
        return error


@pytest.mark.slow
def test_random_options_give_deepspeeds_bits_or_are_refused_as_there(deepspeed_layouts: ModuleType):
    rng = random.Random(0)
    tally: Counter[str] = Counter()
    for _ in range(NUM_BLOCKS_OF_OPTIONS):
        case, seed = draw_options(rng), rng.randrange(1000)
        heads, blocks = rng.choice([1, 2, 4, 5]), rng.choice([rng.randint(1, 20), rng.randint(21, 70)])
        expected = made_by_deepspeed(deepspeed_layouts, case, heads, blocks, seed)
        try:
            layout = build_layout(case, heads, blocks, seed)
        except ConfigError:
            assert isinstance(expected, Exception), (case, heads, blocks)
            tally["refused"] += 1
            continue
        if isinstance(expected, Exception):
            # The one block that works here only: a row with fewer blocks up to its own than it should draw.
            assert "Sample larger than population" in str(expected), (case, heads, blocks)
            assert case["mode"] == "bigbird"
            tally["crashed"] += 1
            continue
        assert torch.equal(layout.dense(), expected), (case, heads, blocks, seed)
        causal = torch.stack([layout.patterns[pattern].to_dense() for pattern in layout.head_patterns])
        assert torch.equal(causal, expected.tril())
        tally[case["mode"]] += 1
    print(dict(tally))
    assert all(tally[mode] > 300 for mode in CLASSES), tally
    assert tally["refused"] > 1000
    assert tally["crashed"] > 100
