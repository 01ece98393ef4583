"""``launch/export.py`` as users start it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapted_models import trainable_state
from rank_processes import process_environment

from sparse_llama import cli
from sparse_llama.adapters.interop import FOREIGN
from sparse_llama.adapters.weights import AdapterFile, BaseModelReference, write_adapter_folder
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.model.assemble import open_model

ROOT = Path(__file__).parents[2]
LAYOUT = {"mode": "bslongformer", "block": 16, "num_sliding_window_blocks": 5, "global_block_indices": [0]}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Return the folder of a run on the bundled model: v2, sparse, bf16, tensors away from their start."""
    from sparse_llama.adapters.attach import attach_adapters, trainable_parameters
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
    write_adapter_folder(tmp_path / "run" / "adapter", tensors, file)
    return tmp_path / "run"


def test_the_command_exports_a_run_that_our_own_commands_open(run_folder: Path, tmp_path: Path):
    output = tmp_path / "out"
    environment = process_environment(HF_HOME=str(tmp_path / "hf"))
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
    assert not (tmp_path / "hf" / "modules").exists()  # its code was copied to a place of the process's own
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


@pytest.mark.parametrize("flag", [("--dtype", "float32"), ("--drop_prompt",), ("--drop_head_bias",)])
@pytest.mark.parametrize("format", ["native", "peft", "lit-llama", "litgpt", "llama-adapter"])
def test_flags_of_the_merged_format_are_refused_for_others(format, flag, tmp_path: Path, capsys):
    arguments = ["--checkpoint", "runs/x", "--output", str(tmp_path / "out"), "--format", format, *flag]
    assert f"{flag[0]}: belongs to --format merged" in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        (("--dense_attention",), "--dense_attention: belongs to --format merged"),
        (("--data", "bundled:people"), "--data: belongs to --format merged"),
        (("--model", "bundled:tiny-llama"), "--model: a native export is the adapter as it is"),
    ],
)
def test_a_native_export_is_the_adapter_as_it_is(run_folder: Path, flag, reason, tmp_path: Path, capsys):
    arguments = ["--checkpoint", str(run_folder), "--output", str(tmp_path / "out"), "--format", "native"]
    assert reason in refusal(capsys, *arguments, *flag)


def test_every_format_of_another_program_can_be_asked_for():
    (format,) = (action for action in cli.export_parser(None)._actions if action.dest == "format")
    assert set(format.choices or ()) == {"merged", "native", *FOREIGN}


def test_a_plain_export_tells_what_it_costs(run_folder: Path, tmp_path: Path, capsys, monkeypatch):
    from sparse_llama.export import reopen

    # test_fresh.py has the process of its own
    monkeypatch.setattr("sparse_llama.export.agreement.measure_elsewhere", reopen.measure_folder)
    (tmp_path / "data.jsonl").write_text('{"text": "one two three"}\n{"text": "four five six"}\n')
    flags = ["--drop_prompt", "--drop_head_bias", "--dense_attention", "--data", str(tmp_path / "data.jsonl")]
    arguments = ["--checkpoint", str(run_folder), "--output", str(tmp_path / "out"), *flags]
    cli.main(cli.export, cli.export_parser(None), arguments)
    said = " ".join(capsys.readouterr().out.split())
    assert "modelling code none, a plain LlamaForCausalLM" in said
    assert re.search(r"validation loss, as trained \d+\.\d{4}", said)
    assert re.search(r"validation loss, as exported \d+\.\d{4}", said)
    assert "without the prompts, the head's bias and the sparse layout in fp32" in said
    assert f'from_pretrained("{tmp_path / "out"}")' in said


def test_an_export_for_litgpt_says_what_opens_it(run_folder: Path, tmp_path: Path, capsys):
    arguments = ["--checkpoint", str(run_folder), "--output", str(tmp_path / "out"), "--format", "litgpt"]
    assert "has no word for the layout" in refusal(capsys, *arguments)
    assert "is not in a run's folder (no run.json)" in refusal(capsys, *arguments, "--dense_attention")
    (tmp_path / "data.txt").write_text("one two three four five six\n" * 3)
    cli.main(
        cli.export,
        cli.export_parser(None),
        [*arguments, "--dense_attention", "--data", str(tmp_path / "data.txt")],
    )
    said = capsys.readouterr().out
    assert "read back, the same adapter" in " ".join(said.split())
    assert f"litgpt generate_adapter_v2 CHECKPOINT_DIR --adapter_path {tmp_path}/out/lit_model.pth" in said


def test_mistakes_are_one_line(run_folder: Path, tmp_path: Path, capsys):
    output = str(tmp_path / "out")
    assert "no such file or folder" in refusal(capsys, "--checkpoint", "runs/none", "--output", output)
    assert "invalid choice: 'int8'" in refusal(
        capsys, "--checkpoint", str(run_folder), "--output", output, "--dtype", "int8"
    )
    assert "no such folder" in refusal(
        capsys, "--checkpoint", str(run_folder), "--output", output, "--model", "./none"
    )
    assert not list(tmp_path.glob("out*"))
