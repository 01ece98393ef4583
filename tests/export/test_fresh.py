"""An export is opened in a process of its own, on tokens enough for its layout to matter.

That one opens, and agrees, is in ``tests/launch/test_export.py``.
"""

import ast
import sys
from pathlib import Path

import pytest
import torch
from exported_runs import LAYOUT, MASTER_LENGTH
from oracles.masked_attention import token_table

from sparse_llama.errors import ExportError
from sparse_llama.export import export_merged, fresh, write
from sparse_llama.export.agreement import Reference, make_reference
from sparse_llama.export.source import find_source
from sparse_llama.layouts import Layout

LAYOUTS = {
    "a large window": {"mode": "local_sliding_window", "block": 4, "num_sliding_window_blocks": 15},
    "windows and a block of each before": LAYOUT | {"num_local_blocks": 8},
    "a small window and the first block": {
        "mode": "bslongformer",
        "block": 4,
        "num_sliding_window_blocks": 3,
    },
}


def test_code_that_needs_this_package_is_refused_and_publishes_nothing(
    trained_run, tmp_path, fresh_process, monkeypatch
):
    code = tmp_path / write.MODELLING_CODE.name
    code.write_text(write.MODELLING_CODE.read_text() + "\nimport sparse_llama\n")
    monkeypatch.setattr(write, "MODELLING_CODE", code)
    with pytest.raises(ExportError, match="ImportError: the folder's code imports sparse_llama"):
        export_merged(trained_run("v1").folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
        ("print('loading')\nraise RuntimeError('first\\nlast')", r"\(RuntimeError: first last\)"),
        ("raise SystemExit(3)", "exit status 3"),
    ],
)
def test_a_process_that_fails_is_one_line(tmp_path, monkeypatch, program, reason):
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setattr(fresh.reopen, "__file__", str(tmp_path / "program.py"))
    with pytest.raises(ExportError, match=f"does not open in a process of its own, .*{reason}") as caught:
        fresh.measure_elsewhere(tmp_path, {"tokens": torch.zeros(1, 4)}, {})
    assert "\n" not in str(caught.value)


def reference_of(run) -> tuple[Reference, Layout]:
    source = find_source(run.folder, None)
    (layout,) = source.layouts
    reference = make_reference(
        source.base, source.adapter, left_out=frozenset(), dtype=torch.float32, layouts=source.layouts
    )
    return reference, layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_comparison_is_three_windows_long_and_under_half_dense(trained_run, name):
    """Oracle: the table of all pairs of tokens, counted."""
    reference, layout = reference_of(trained_run("v1", layout=LAYOUTS[name], max_position_embeddings=256))
    table, triangle = token_table(layout, 4, 256), torch.ones(256, 256).tril()
    num_seen, found = table.sum(-1), reference.tokens.shape[1]
    window = next(token for token in range(256) if bool((num_seen[:, token] < token + 1).any()))
    assert 3 * window < found < 256

    def density(length: int) -> float:
        return float(table[:, :length, :length].sum() / (4 * triangle[:length, :length].sum()))

    assert density(found) < 0.5
    assert reference.density == pytest.approx(density(found))
    assert found <= max(96, 3 * window + 3) or density(found - layout.block) >= 0.5


def test_the_comparison_is_no_longer_than_the_layout(trained_run):
    reference, layout = reference_of(trained_run("v1", layout=LAYOUT))
    assert reference.tokens.shape[1] == layout.num_tokens == MASTER_LENGTH


def test_the_program_of_the_process_imports_torch_transformers_and_safetensors_only():
    tree = ast.parse(Path(fresh.reopen.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    third_parties = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert third_parties == {"torch", "transformers", "safetensors"}
