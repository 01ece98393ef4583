"""Tiles and head groups under DeepSpeed: at every stage plain torch's losses and gradients, each gradient
there once, and at stage 3 a layer's weights at a time.

One process for all cases: DeepSpeed takes 5 s to start. Stage 3 comes last, as it patches torch for good.
Which other levers they go with is ``tests/matrix``'s to show.
"""

import json
from itertools import product
from pathlib import Path

import pytest

Case = tuple[str, str, int, str, bool]
"""Levers, version, stage, what is checkpointed, and whether the model is loaded in parts."""
CASES: list[Case] = [
    *(("tiles", version, stage, "every", False) for version, stage in product(("v1", "v2"), (0, 2))),
    *(("head groups", version, stage, "none", False) for version, stage in product(("v1", "v2"), (0, 2))),
    ("head groups", "v2", 2, "on the host", False),
    ("tiles", "v2", 2, "none", False),
    ("tiles", "v2", 3, "every", False),  # loaded whole, partitioned by the engine
    ("head groups", "v2", 3, "none", False),
    *(("tiles", version, 3, kept, True) for version, kept in product(("v1", "v2"), ("every", "none"))),
    *(("head groups", version, 3, "none", True) for version in ("v1", "v2")),
    ("head groups", "v2", 3, "on the host", True),
    ("head groups", "v2", 3, "every second on the host", True),
]
SOURCE = "import runpy, sys; sys.argv[0] = 'steps'; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


@pytest.fixture(scope="module")
def results(tiny_llama, run_python, tmp_path_factory) -> dict[Case, dict]:
    folder = tmp_path_factory.mktemp("stages")
    tiny_llama().save_pretrained(folder / "base")
    names = ("levers", "version", "stage", "checkpoints", "is_partitioned")
    cases = [{"folder": str(folder / "base"), **dict(zip(names, case, strict=True))} for case in CASES]
    program = str(Path(__file__).with_name("stage_steps.py"))
    run_python(SOURCE, program, json.dumps(cases), str(folder / "results"))
    lines = (folder / "results").read_text().splitlines()
    return {case: json.loads(line) for case, line in zip(CASES, lines, strict=True)}


def test_losses_and_gradients_are_plain_torchs(results):
    """Memory traps 9 and 10: two micro-batches of 12 and 6 labelled tokens, each times its factor.

    As a "leaf" of ZeRO-3's the lowest layer of v2 would train on zeros: DeepSpeed reduces a leaf's gradients
    when its output's has come, which without an input's is before they are made."""
    for case, result in results.items():
        assert result["losses"] == pytest.approx(result["expected_losses"], rel=1e-5), case
        assert result["without_gradient"] == [], case
        assert result["worst_gradient"] < 2e-5, case


def test_every_gradient_is_written_once_per_micro_batch(results):
    """Memory trap 14: ZeRO reduces a gradient whenever it is written, so four tiles would reduce it four
    times."""
    for case, result in results.items():
        assert result["times_written"] == [4], case


def test_stage_3_has_the_weights_of_a_layer_at_a_time(results):
    """This is what streaming them is for: of four layers one is whole, or the next one too while it is
    fetched."""
    for (levers, _, stage, checkpoints, _), result in results.items():
        if stage == 3:
            assert result["whole_after"] == 0, result
            if levers == "head groups" and checkpoints == "none":
                # the hooks of a checkpoint, and what other layers save, hide the others from the watch
                assert 1 <= result["most_whole_layers"] <= 2, result
