"""Under DeepSpeed, every stage trains what plain torch trains: same losses, same gradients, nothing left out.

One process for all cases: DeepSpeed takes 5 s to start. Stage 3 comes last, as it patches torch for good.
"""

import json
from itertools import product
from pathlib import Path

import pytest

Case = tuple[str, str, int, str, bool]
"""Precision, version, stage, which layer inputs are kept, and whether the model is loaded in parts."""
NESTED = {"v1": "every second, on a drive", "v2": "every second, on the host"}
CASES: list[Case] = [
    *(("fp32", version, stage, "every", False) for version, stage in product(("v1", "v2"), (0, 1, 2))),
    *(("fp32", version, stage, NESTED[version], False) for version, stage in product(("v1", "v2"), (0, 2))),
    *(("bf16", "v2", stage, "every", False) for stage in (0, 1, 2)),
    ("fp32", "v2", 2, "every second, of head groups", False),
    ("fp32", "v2", 3, "every", False),  # loaded whole, partitioned by the engine
    *(
        ("fp32", version, 3, checkpoints, True)
        for version in ("v1", "v2")
        for checkpoints in ("every", "none", NESTED[version], "every second, of head groups")
    ),
    ("bf16", "v2", 3, "every", True),
]
SOURCE = "import runpy, sys; sys.argv[0] = 'zero_steps'; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


@pytest.fixture(scope="module")
def results(tiny_llama, run_python, tmp_path_factory) -> list[dict]:
    """Of every case, then of the weights of two bases loaded in parts."""
    folder = tmp_path_factory.mktemp("zero")
    tiny_llama().save_pretrained(folder / "base")
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder / "tied")
    names = ("precision", "version", "stage", "checkpoints", "is_partitioned")
    cases = [{"folder": str(folder / "base"), **dict(zip(names, case, strict=True))} for case in CASES]
    cases += [{"folder": str(folder / name), "only_weights": True} for name in ("base", "tied")]
    program = str(Path(__file__).with_name("zero_steps.py"))
    run_python(SOURCE, program, json.dumps(cases), str(folder / "results"))
    found = [json.loads(line) for line in (folder / "results").read_text().splitlines()]
    assert len(found) == len(cases)
    return found


def of(precision: str, results: list[dict]) -> list[tuple[Case, dict]]:
    return [pair for pair in zip(CASES, results, strict=False) if pair[0][0] == precision]


def test_fp32_losses_and_gradients_are_plain_torchs_at_every_stage(results):
    """T23, memory trap 18: v1 and v2, checkpointed layers behind a frozen embedding, ZeRO 0 to 3."""
    for case, result in of("fp32", results):
        assert result["losses"] == pytest.approx(result["expected_losses"], rel=1e-5), case
        assert result["without_gradient"] == [], case
        assert result["worst_gradients"][0] < 1e-5, case
        # Adam's first step is lr x sign(gradient): a gradient of rounding size may move an element the other
        # way
        assert result["worst_gradients"][1] < 2e-3, case


def test_bf16_moves_every_fp32_master(results):
    """T6: a scale near 1 cannot move by lr x grad in bf16; rotary frequencies stay fp32 as well."""
    for case, result in of("bf16", results):
        assert result["master_dtypes"] == ["torch.float32"], case
        assert result["inv_freq_dtype"] == "torch.float32", case
        assert result["without_gradient"] == [], case
        assert result["unmoved"] == [], case
        assert result["losses"] == pytest.approx(result["expected_losses"], rel=3e-2), case  # 8 bits


@pytest.mark.parametrize(("result", "is_tied"), [(-2, False), (-1, True)])
def test_partitioned_loading_gives_the_same_weights(results, result, is_tied):
    expected = {"is_partitioned": True, "different": [], "rotary_is_equal": True, "is_tied": is_tied}
    assert results[result] == expected
