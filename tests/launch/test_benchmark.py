"""``launch/benchmark.py`` as users start it: what it prints, what it writes, and with mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import process_environment

from sparse_llama import cli

ROOT = Path(__file__).parents[2]
TINY = ["--modes", "fixed,local_sliding_window", "--lengths", "384,256", "--blocks", "16", "--heads", "2"]
TINY += ["--head_dim", "8", "--repeats", "2", "--backends", "blockwise"]


def benchmark(*arguments: str | Path) -> None:
    cli.main(cli.benchmark, cli.benchmark_parser("doc"), [str(argument) for argument in arguments])


def test_the_script_measures_prints_and_saves(tmp_path: Path):
    folder = tmp_path / "deep" / "results"
    asked = ["attention", *TINY, "--kv_heads", "1", "--output_dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "launch/benchmark.py", *asked],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((folder / "attention_cpu.json").read_text(encoding="utf-8"))
    assert saved["provenance"]["command"].endswith(f"python launch/benchmark.py {' '.join(asked)}")
    assert saved["sizes"]["num_kv_heads"] == 1
    assert [(group["num_tokens"], group["block"]) for group in saved["groups"]] == [(384, 16), (256, 16)]
    for group in saved["groups"]:
        assert [one["kernel"] for one in group["dense"]] == ["flash"]
        assert [one["layout"] for one in group["full"]] == ["full"]
        assert [one["layout"] for one in group["sparse"]] == ["fixed", "local_sliding_window"]
        for one in (*group["full"], *group["sparse"]):
            assert one["error"] < 1e-5
            for timing in one["times"].values():
                assert 0 < timing["lower_ms"] <= timing["median_ms"] <= timing["upper_ms"]
        for one in group["sparse"]:
            assert one["options"]["block"] == 16
            dense_ms = group["dense"][0]["times"]["both"]["median_ms"]
            expected = dense_ms / one["times"]["both"]["median_ms"] * one["density"]
            assert one["efficiency"]["both"]["total"] == pytest.approx(expected)
            assert f"{expected:.2f}" in done.stdout
    assert "384 tokens, block 16" in done.stdout
    assert "local_sliding_window" in (folder / "attention_cpu.md").read_text(encoding="utf-8")
    assert (folder / "attention_cpu.png").stat().st_size > 10_000
    assert f"wrote {folder}/attention_cpu.png" in done.stdout


def test_layouts_are_built_and_weighed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = ["--lengths", "4096", "--blocks", "16,64", "--repeats", "2"]
    benchmark("layouts", "--modes", "fixed,bigbird", *sizes, "--output_dir", tmp_path)
    saved = json.loads((tmp_path / "layouts.json").read_text(encoding="utf-8"))
    found = [(one["layout"], one["options"]["block"]) for one in saved["layouts"]]
    assert found == [("fixed", 16), ("bigbird", 16), ("fixed", 64), ("bigbird", 64)]
    assert [one["num_bytes_dense"] for one in saved["layouts"]] == [32 * 256**2 * 8] * 2 + [
        32 * 64**2 * 8
    ] * 2
    assert all(0 < one["num_bytes"] < one["num_bytes_dense"] for one in saved["layouts"])
    shown = capsys.readouterr().out
    assert "16.0 MiB" in shown  # 32 x 256 x 256 int64
    assert "| bigbird | 4,096 | 64 |" in (tmp_path / "layouts.md").read_text(encoding="utf-8")


def test_a_peer_that_cannot_run_here_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    benchmark("attention", *TINY[:-2], "--lengths", "256", "--output_dir", tmp_path)
    assert "not measured: flex; compiled for a CPU it needs a C++ compiler" in capsys.readouterr().out
    saved = json.loads((tmp_path / "attention_cpu.json").read_text(encoding="utf-8"))
    assert saved["sizes"]["backends"] == ["blockwise"]
    assert "C++ compiler" in saved["skipped"]["flex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--modes", "fixd"], "--modes: none is called 'fixd'; did you mean 'fixed'"),
        (["attention", "--modes", "fixed,"], "--modes: none is called ''; allowed: fixed, "),
        (["attention", "--lengths", "4k"], "--lengths: must be whole numbers above 0, .* got '4k'"),
        (["layouts", "--blocks", "0"], "--blocks: must be whole numbers above 0, .* got '0'"),
        (
            ["attention", "--lengths", "64", "--blocks", "16"],
            "--blocks: 16 is too large for --lengths 64; use at most 8",
        ),
        (
            ["attention", "--blocks", "1024"],
            "--blocks: 1024 is too large for --lengths 4096; use at most 512",
        ),
        (
            ["attention", "--backends", "triton"],
            "--backends: triton does not run on this cpu device; it needs a CUDA",
        ),
        (["attention", "--backends", "flexx"], "--backends: none is called 'flexx'; did you mean 'flex'"),
        (
            ["attention", "--heads", "4", "--kv_heads", "3"],
            "--kv_heads: must divide the 4 query heads, got 3",
        ),
        (["attention", "--heads", "0"], "--heads: must be 1 or more, got 0"),
        (["attention", "--head_dim", "-8"], "--head_dim: must be 1 or more, got -8"),
        (["attention", "--repeats", "0"], "--repeats: must be 1 or more, got 0"),
        (["attention", "--output_dir", "FILE"], "--output_dir .*file.txt: cannot be made"),
        (["layouts", "--dtype", "float32"], "--dtype: belongs to attention"),
        (["layouts", "--kv_heads", "2"], "--kv_heads: belongs to attention"),
        (["attention", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (["steps"], "argument what: invalid choice"),
        (["attention", "--mode", "fixed"], "--mode: unknown flag; did you mean '--modes'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    file = tmp_path / "file.txt"
    file.write_text("x", encoding="utf-8")
    places = [str(file) if argument == "FILE" else argument for argument in arguments]
    if "FILE" not in arguments:
        places += ["--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        benchmark(*places)
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: {message}", said), said


@pytest.mark.parametrize(
    "arguments", [["attention", "--modes", "nothing"], ["layouts", "--dtype", "float16"]]
)
def test_a_mistake_is_told_before_torch_is_imported(arguments: list[str], tmp_path: Path):
    source = f"""
import sys
from sparse_llama import cli
try:
    cli.main(cli.benchmark, cli.benchmark_parser("doc"), {[*arguments, "--output_dir", str(tmp_path)]!r})
except SystemExit as ended:
    assert ended.code == 2 and "torch" not in sys.modules
    print("told")
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "told\n", done.stderr
