"""``launch/export.py`` as users start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_llama import cli
from sparse_llama.adapters.weights import AdapterFile, BaseModelReference, save_adapter
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.model.assemble import open_model

ROOT = Path(__file__).parents[2]
LAYOUT = {"mode": "bslongformer", "block": 16, "num_sliding_window_blocks": 5, "global_block_indices": [0]}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Return the folder of a run on the bundled model: v2, sparse, bf16, tensors away from their start."""
    from sparse_llama.adapters.attach import attach_adapters, trainable_parameters, trainable_state
    from sparse_llama.attention.interface import attach_attention, plan_attention
    from sparse_llama.model.llama import load_llama

    model = load_llama("bundled:tiny-llama", dtype=torch.float32).model
    config = model.config
    sparsities = [parse_sparsity(LAYOUT)] * config.num_hidden_layers
    plan = plan_attention(sparsities, num_heads=config.num_attention_heads, master_length=256, seed=0)
    attach_attention(model, plan)
    settings = AdapterSettings(version="v2", prompt_length=10, start_layer=2)
    attach_adapters(model, settings, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    tensors = trainable_state(model)
    file = AdapterFile(
        base_model=BaseModelReference(path="bundled:tiny-llama"),
        adapter=settings,
        sparse_attention=LAYOUT,
        master_length=256,
        seed=0,
        seq_length=256,
        dtype="bfloat16",
        trainable_parameters=sum(tensor.numel() for tensor in tensors.values()),
        version="0",
    )
    save_adapter(tmp_path / "run" / "adapter", tensors, file)
    return tmp_path / "run"


def test_the_command_exports_a_run_that_our_own_commands_open(run_folder: Path, tmp_path: Path):
    output = tmp_path / "out"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "launch/export.py", "--checkpoint", run_folder, "--output", output],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code=True" in done.stdout
    assert "relative error" in done.stdout
    exported, adapted = (
        open_model(str(output)).model,
        open_model(None, run_folder / "adapter", dtype=torch.float32).model,
    )
    assert exported.dtype == torch.bfloat16
    ids = torch.randint(1344, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = adapted(input_ids=ids).logits, exported(input_ids=ids).logits.float()
    assert (found - expected).norm() / expected.norm() < 0.05


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(cli.export, cli.export_parser(None), arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_a_native_export_says_what_it_is_for(run_folder: Path, tmp_path: Path, capsys):
    arguments = ["--checkpoint", str(run_folder), "--output", str(tmp_path / "out"), "--format", "native"]
    cli.main(cli.export, cli.export_parser(None), arguments)
    assert "--adapter of evaluate.py and generate.py" in capsys.readouterr().out
    assert "not empty; replace it with --overwrite" in refusal(capsys, *arguments)
    cli.main(cli.export, cli.export_parser(None), [*arguments, "--overwrite"])


@pytest.mark.parametrize("flag", [("--dtype", "float32"), ("--model", "bundled:tiny-llama")])
def test_flags_of_the_merged_format_are_refused_for_the_native_one(flag, tmp_path: Path, capsys):
    arguments = ["--checkpoint", "runs/x", "--output", str(tmp_path / "out"), "--format", "native", *flag]
    assert f"{flag[0]}: belongs to --format merged" in refusal(capsys, *arguments)


def test_mistakes_are_one_line(run_folder: Path, tmp_path: Path, capsys):
    output = str(tmp_path / "out")
    assert "no such folder" in refusal(capsys, "--checkpoint", "runs/none", "--output", output)
    assert "invalid choice: 'int8'" in refusal(
        capsys, "--checkpoint", str(run_folder), "--output", output, "--dtype", "int8"
    )
    assert "no such folder" in refusal(
        capsys, "--checkpoint", str(run_folder), "--output", output, "--model", "./none"
    )
    assert not list(tmp_path.glob("out*"))
