"""What a run says of its data before the first step."""

import json
from pathlib import Path

from sparse_llama.config.run import Overrides, load_run
from sparse_llama.training.loop import fit


def test_the_start_of_a_run_has_the_account_and_warns_of_what_is_lost(tmp_path: Path, capsys):
    """Records with a text beside the question are some 90 tokens long, a third of all."""
    document = {
        "train_micro_batch_size_per_gpu": 2,
        "sparse_llama": {"seq_length": 64, "training": {"steps": 1, "samples": 0}},
    }
    (tmp_path / "short.json").write_text(json.dumps(document), encoding="utf-8")
    fit(load_run(tmp_path / "short.json", Overrides(output_dir=tmp_path / "out"), 1))
    said = " ".join(capsys.readouterr().out.split())
    assert "categories classification 868, closed_qa 867, closed_book 665" in said
    assert "lengths 53 tokens at the median, 89 at 90%" in said
    assert "note: 867 of 2,400 training records (36%) are longer than 64 tokens: 0 lose their ends" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["data"]["training"]["dropped"] == 867
