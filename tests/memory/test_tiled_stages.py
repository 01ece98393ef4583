"""Tiles under DeepSpeed: parameters that ZeRO-3 has in parts are whole where a tile needs them, and every
gradient is there once, whatever the loss is multiplied by.

One process for all cases: DeepSpeed takes 5 s to start. Stage 3 comes last, as it patches torch for good.
"""

import json
from itertools import product
from pathlib import Path

import pytest

CASES = [
    *((version, stage, True, False) for version, stage in product(("v1", "v2"), (0, 2))),
    ("v2", 2, False, False),
    ("v2", 3, True, False),  # loaded whole, partitioned by the engine
    *(
        (version, 3, is_checkpointed, True)
        for version, is_checkpointed in product(("v1", "v2"), (True, False))
    ),
]
SOURCE = (
    "import runpy, sys; sys.argv[0] = 'tiled_steps'; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
)


@pytest.fixture(scope="module")
def results(tiny_llama, run_python, tmp_path_factory) -> dict[tuple, dict]:
    folder = tmp_path_factory.mktemp("tiled")
    tiny_llama().save_pretrained(folder / "base")
    names = ("version", "stage", "is_checkpointed", "is_partitioned")
    cases = [{"folder": str(folder / "base"), **dict(zip(names, case, strict=True))} for case in CASES]
    program = str(Path(__file__).with_name("tiled_steps.py"))
    run_python(SOURCE, program, json.dumps(cases), str(folder / "results"))
    lines = (folder / "results").read_text().splitlines()
    return {case: json.loads(line) for case, line in zip(CASES, lines, strict=True)}


def test_losses_and_gradients_are_those_of_plain_torch_without_tiles(results):
    """Memory traps 9 and 10: two micro-batches of 12 and 6 labelled tokens, each times its factor."""
    for case, result in results.items():
        assert result["losses"] == pytest.approx(result["expected_losses"], rel=1e-5), case
        assert result["without_gradient"] == [], case
        assert result["worst_gradient"] < 2e-5, case


def test_every_gradient_is_written_once_per_micro_batch(results):
    """Memory trap 14: ZeRO reduces a gradient whenever it is written, so four tiles would reduce it four
    times."""
    for case, result in results.items():
        assert result["times_written"] == [4], case
