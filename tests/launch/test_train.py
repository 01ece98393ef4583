"""``launch/train.py`` as users start it: under the launcher, with one process and with two, and with
mistakes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import process_environment
from small_runs import losses

from sparse_llama import cli
from sparse_llama.config.bundled import DATASETS
from sparse_llama.config.run import Overrides, load_run
from sparse_llama.training.loop import fit

ROOT = Path(__file__).parents[2]


def launch(
    port: int,
    *arguments: str,
    script: str = "launch/train.py",
    processes: int = 1,
    timeout_s: int = 240,
) -> subprocess.CompletedProcess[str]:
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        launcher,
        "--master_port",
        str(port),
        "--num_gpus",
        str(processes),
        script,
        *arguments,
    ]
    environment = process_environment()
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
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled records, a few of them to validate on."""
    folder, bundled = tmp_path_factory.mktemp("people"), DATASETS["bundled:people"]
    shutil.copyfile(bundled / "train.jsonl", folder / "train.jsonl")
    lines = (bundled / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "validation.jsonl").write_text("".join(lines[:12]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def a100_run(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for the 40 GB GPU, with model, data and size overridden, on one CPU process."""
    output_dir = tmp_path_factory.mktemp("a100") / "run"
    from sparse_llama.distributed.ranks import free_port

    flags = ["--model", "bundled:tiny-llama", "--dataset", str(people), "--seq_length", "384", "--steps", "1"]
    done = launch(
        free_port(), "--ds_config", "ds_configs/a100_40g.json", *flags, "--output_dir", str(output_dir)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output_dir


def test_the_file_for_a_40_gb_gpu_runs_as_it_stands_on_a_tiny_model(a100_run: Path):
    summary = json.loads((a100_run / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 1
    assert summary["precision"] == "bf16"
    assert summary["adapter_version"] == "v2"
    assert summary["attention"] != "dense"
    record = json.loads((a100_run / "run.json").read_text(encoding="utf-8"))
    assert record["deepspeed"]["train_micro_batch_size_per_gpu"] == 4


def test_two_processes_follow_one(people: Path, tmp_path: Path, free_port: int):
    """T26: two processes are two, share the global batch, and save the same bytes as one."""

    def configuration(processes: int) -> Path:
        document = json.loads((ROOT / "ds_configs" / "cpu_demo.json").read_text(encoding="utf-8"))
        document["sparse_llama"]["training"] = {"steps": 3, "samples": 0}
        document["sparse_llama"]["data"] = {"dataset": str(people)}
        document["train_micro_batch_size_per_gpu"] = 2
        document["gradient_accumulation_steps"] = 2 // processes
        path = tmp_path / f"config_{processes}.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        return path

    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    fit(load_run(configuration(1), Overrides(output_dir=one, zero_stage=2, seq_length=256), world_size=1))
    flags = ["--ds_config", str(configuration(2)), "--seq_length", "256"]
    fresh = [*flags, "--zero_stage", "2", "--output_dir", str(two)]
    resume = ["--resume", str(one / "checkpoints" / "step_000003"), "--zero_stage", "3"]
    runs = [json.dumps(fresh), json.dumps([*flags, *resume, "--output_dir", str(again)])]
    done = launch(free_port, *runs, script="tests/launch/train_twice.py", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for output_dir, processes in ((one, 1), (two, 2), (again, 2)):
        record = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
        assert record["world_size"] == processes
    assert len(losses(one)) == 3
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for name in ("adapter.safetensors", "adapter_config.json"):
        assert (again / "adapter" / name).read_bytes() == (one / "adapter" / name).read_bytes()


def test_a_mistake_is_said_once_whatever_the_number_of_processes(tmp_path: Path, free_port: int):
    path = tmp_path / "typo.json"
    path.write_text('{"gradient_acumulation_steps": 4}', encoding="utf-8")
    done = launch(free_port, "--ds_config", str(path), processes=2, timeout_s=60)
    assert done.returncode == 2
    said = [line for line in (done.stdout + done.stderr).splitlines() if "gradient_acumulation_steps" in line]
    assert len(said) == 1
    assert "did you mean 'gradient_accumulation_steps'" in said[0]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_beyond_the_bases_positions_is_refused_once_whatever_the_number_of_processes(free_port: int):
    """Every process looks into ``config.json`` for itself; none reads data or weights before."""
    done = launch(free_port, "--seq_length", "4096", "--output_dir", "nowhere", processes=2, timeout_s=60)
    assert done.returncode == 2
    printed = done.stdout + done.stderr
    said = [line for line in printed.splitlines() if "seq_length: 4096" in line]
    assert len(said) == 1
    assert "bundled:tiny-llama was made for 2048 positions (max_position_embeddings)" in said[0]
    assert "--rope yarn" in said[0]
    assert "reading bundled:people" not in printed
    assert "Traceback" not in printed


def test_a_folder_with_another_run_is_not_written_over(a100_run: Path, capsys: pytest.CaptureFixture[str]):
    before = (a100_run / "summary.json").read_bytes()
    with pytest.raises(SystemExit) as ended:
        cli.main(cli.train, cli.train_parser("doc"), ["--output_dir", str(a100_run)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--resume" in said
    assert "--overwrite" in said
    assert (a100_run / "summary.json").read_bytes() == before
