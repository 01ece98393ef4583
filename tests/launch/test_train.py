"""``launch/train.py`` as users start it: under the launcher, with one process and with two, and with
mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import losses

ROOT = Path(__file__).parents[2]
TINY = ["--model", "bundled:tiny-llama", "--dataset", "bundled:people"]


def launch(
    port: int, *arguments: str, processes: int = 1, timeout_s: int = 240
) -> subprocess.CompletedProcess[str]:
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        launcher,
        "--master_port",
        str(port),
        "--num_gpus",
        str(processes),
        "launch/train.py",
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture(scope="module")
def a100_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for the 40 GB GPU, with only its size overridden, on one CPU process."""
    output_dir = tmp_path_factory.mktemp("a100") / "run"
    from sparse_llama.distributed.ranks import _free_port

    flags = [*TINY, "--seq_length", "512", "--steps", "2", "--output_dir", str(output_dir)]
    done = launch(_free_port(), "--ds_config", "ds_configs/a100_40g.json", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return output_dir


def test_the_file_for_a_40_gb_gpu_runs_as_it_stands_on_a_tiny_model(a100_run: Path):
    summary = json.loads((a100_run / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2
    assert summary["precision"] == "bf16"
    assert summary["adapter_version"] == "v2"
    assert summary["attention"] != "dense"
    record = json.loads((a100_run / "run.json").read_text(encoding="utf-8"))
    assert record["deepspeed"]["train_micro_batch_size_per_gpu"] == 4


def test_two_processes_follow_one(tmp_path: Path, free_port: int):
    """T26: two processes are two, share the global batch, and save the same bytes as one."""
    document = json.loads((ROOT / "ds_configs" / "cpu_demo.json").read_text(encoding="utf-8"))
    document["sparse_llama"]["training"] = {"steps": 3, "samples": 0}
    curves = []
    for processes in (1, 2):
        document["train_micro_batch_size_per_gpu"] = 2
        document["gradient_accumulation_steps"] = 2 // processes
        path = tmp_path / "config.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        output_dir = tmp_path / f"{processes}"
        flags = ["--zero_stage", "2", "--seq_length", "256", "--output_dir", str(output_dir)]
        done = launch(free_port, "--ds_config", str(path), *flags, processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr
        curves.append(losses(output_dir))
        record = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
        assert record["world_size"] == processes
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)

    again = tmp_path / "again"
    resume = ["--resume", str(tmp_path / "1" / "checkpoints" / "step_000003"), "--zero_stage", "3"]
    flags = [*resume, "--seq_length", "256", "--output_dir", str(again)]
    done = launch(free_port, "--ds_config", str(path), *flags, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("adapter.safetensors", "adapter_config.json"):
        assert (again / "adapter" / name).read_bytes() == (tmp_path / "1" / "adapter" / name).read_bytes()


def test_a_mistake_is_said_once_whatever_the_number_of_processes(tmp_path: Path, free_port: int):
    path = tmp_path / "typo.json"
    path.write_text('{"gradient_acumulation_steps": 4}', encoding="utf-8")
    done = launch(free_port, "--ds_config", str(path), processes=2, timeout_s=60)
    assert done.returncode == 2
    said = [line for line in (done.stdout + done.stderr).splitlines() if "gradient_acumulation_steps" in line]
    assert len(said) == 1
    assert "did you mean 'gradient_accumulation_steps'" in said[0]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_folder_with_another_run_is_not_written_over(a100_run: Path, free_port: int):
    before = (a100_run / "summary.json").read_bytes()
    done = launch(free_port, *TINY, "--steps", "1", "--output_dir", str(a100_run), timeout_s=60)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert "--overwrite" in done.stderr
    assert (a100_run / "summary.json").read_bytes() == before
