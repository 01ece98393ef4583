"""The report on the Triton kernels that needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracles.masked_attention import token_table

from sparse_llama import cli
from sparse_llama.attention.tiles import choose_tiles
from sparse_llama.attention.triton_compile import Compiled
from sparse_llama.benchmark.kernels import count_use, save_kernels
from sparse_llama.benchmark.layouts import layout_options
from sparse_llama.benchmark.provenance import provenance
from sparse_llama.layouts import build_layout

ROOT = Path(__file__).parents[2]


def test_what_is_written_is_what_was_found(tmp_path: Path):
    import torch

    tile = choose_tiles(64, 128, torch.bfloat16, (9, 0)).forward
    found = Compiled("forward", 90, 128, 64, "bf16", tile, 211, 8, 98 * 1024)
    (used,) = count_use(["fixed"], num_tokens=2048, blocks=[64])
    save_kernels(tmp_path, [found], [used], provenance("launch/benchmark.py", ["kernels"]))
    saved = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert saved["compiled"][0]["registers"] == 211
    assert saved["utilisation"][0]["utilisation"] == used.utilisation._asdict()
    assert {"date", "command", "git_commit", "hardware", "versions"} <= saved["provenance"].keys()
    text = (tmp_path / "kernels.md").read_text(encoding="utf-8")
    assert f"| forward | sm_90 | 128 | 64 | {tile.queries} x {tile.keys} |" in text
    assert "| 211 | 8 B | 98 KiB |" in text


def test_a_tile_computes_at_least_what_attends():
    """Density by the definition; no more can be of use than is computed."""
    for one in count_use(["fixed", "bslongformer"], num_tokens=1024, blocks=[16, 64]):
        options = layout_options(one.layout, block=one.block, num_tokens=1024)
        table = token_table(build_layout(options, 1, 1024 // one.block), 1, 1024)
        assert one.density == pytest.approx(float(table.sum()) / (1024 * 1025 / 2))
        assert all(0.05 < share <= 1 for share in one.utilisation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "4"], "--heads: no choice of kernels; widths of 64 to 256 in bf16 are compiled"),
        (["--lengths", "4096,8192"], "--lengths: kernels are counted at one; leave it out for 16384"),
        ([], "TRITON_INTERPRET: 1 leaves nothing to compile; unset it"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    flags = cli.benchmark_parser("doc")
    with pytest.raises(SystemExit) as stopped:
        cli.main(cli.benchmark, flags, ["kernels", "--output_dir", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.slow
def test_the_script_compiles_counts_and_saves(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = [
        "kernels",
        "--modes",
        "fixed",
        "--lengths",
        "2048",
        "--blocks",
        "64",
        "--output_dir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, "launch/benchmark.py", *asked],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert {(one["kernel"], one["capability"]) for one in saved["compiled"]} == {
        (kernel, capability)
        for kernel in ("forward", "grad_query", "grad_key_value", "add_partials")
        for capability in (80, 90)
    }
