"""The demo's promise, on a short run: an adapter that visibly learns about people it was never told about."""

import json
from pathlib import Path

import pytest

from sparse_llama.config.run import EMBEDDED, Overrides, load_run
from sparse_llama.training.loop import fit


@pytest.mark.parametrize(
    ("adapter", "lr", "steps"), [("v2", 1e-2, 15), pytest.param("v1", 2e-2, 100, marks=pytest.mark.slow)]
)
def test_a_short_run_teaches_the_answers_that_the_base_never_gives(tmp_path: Path, adapter, lr, steps):
    document = json.loads(EMBEDDED.read_text(encoding="utf-8"))
    training = document["sparse_llama"]["training"]
    training |= {"steps": steps, "samples": 0, "exact_match_records": 24}
    del training["eval_every"]
    path = tmp_path / "short.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    fit(load_run(path, Overrides(output_dir=tmp_path / "run", adapter=adapter, lr=lr), world_size=1))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["density"] <= 0.5
    assert summary["exact_match_before"]["average"] < 0.05
    assert summary["exact_match"]["average"] > 0.4
    assert summary["validation_loss"] < 0.5 * summary["validation_loss_before"]
