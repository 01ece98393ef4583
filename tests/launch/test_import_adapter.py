"""``launch/import_adapter.py``: another program's file becomes an adapter folder that computes the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapted_models import save_adapted
from rank_processes import process_environment
from safetensors.torch import save_file
from transformers import LlamaConfig

from sparse_llama import cli
from sparse_llama.model.assemble import open_model
from sparse_llama.model.files import resolve_model

ROOT = Path(__file__).parents[2]
BASE = "bundled:tiny-llama"


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    return LlamaConfig.from_pretrained(resolve_model(BASE, None))


@pytest.fixture
def litgpt_file(config: LlamaConfig, tmp_path: Path) -> Path:
    """litgpt's v1 keys and shapes, written out (litgpt/adapter.py): prompts and gates from layer 2 on."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2, config.num_hidden_layers):
        name = f"transformer.h.{layer}.attn"
        prompt = torch.randn(10, config.hidden_size, generator=generator)
        gate = torch.randn(1, 1, config.num_attention_heads, 1, generator=generator)
        tensors |= {f"{name}.adapter_wte.weight": prompt, f"{name}.gating_factor": gate}
    torch.save({"model": tensors}, tmp_path / "lit_model.pth.adapter")
    return tmp_path / "lit_model.pth.adapter"


@pytest.fixture
def peft_folder(config: LlamaConfig, tmp_path: Path) -> Path:
    folder = tmp_path / "peft"
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers - 1, config.num_hidden_layers):
        name = f"base_model.model.model.layers.{layer}.self_attn"
        prompt = torch.randn(1, 4, config.hidden_size, generator=torch.Generator().manual_seed(1))
        tensors |= {f"{name}.adaption_prompt": prompt, f"{name}.adaption_gate": torch.tensor([0.7])}
    save_file(tensors, folder / "adapter_model.safetensors")
    document = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 1}
    document["base_model_name_or_path"] = BASE
    (folder / "adapter_config.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def run(*arguments: str | Path) -> None:
    words = [str(argument) for argument in arguments]
    cli.main(cli.import_adapter, cli.import_adapter_parser("doc"), words)


def logits(model: str | None, adapter: Path) -> torch.Tensor:
    opened = open_model(model, adapter, dtype=torch.float32)
    with torch.no_grad():
        return opened.model(input_ids=torch.arange(5, 25)[None]).logits


def test_a_file_without_the_name_of_its_base_is_given_one(litgpt_file, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--adapter", litgpt_file, "--output", tmp_path / "out")
    said = capsys.readouterr().err
    assert said == f"error: --adapter {litgpt_file}: does not name its base; give it with --model\n"
    run("--adapter", litgpt_file, "--model", BASE, "--output", tmp_path / "out")
    shown = " ".join(capsys.readouterr().out.split())  # long notes are wrapped
    assert "litgpt" in shown
    assert "version v1, prompt_length 10" in shown
    assert "since December 2024" in shown
    assert torch.equal(logits(None, tmp_path / "out"), logits(BASE, litgpt_file))
    assert not torch.allclose(logits(None, tmp_path / "out"), logits_of_base())


def logits_of_base() -> torch.Tensor:
    with torch.no_grad():
        return open_model(BASE, dtype=torch.float32).model(input_ids=torch.arange(5, 25)[None]).logits


def test_a_peft_folder_names_its_base_and_stays_one_gate_a_layer(peft_folder, tmp_path, capsys):
    run("--adapter", peft_folder, "--output", tmp_path / "out")
    assert "version v1, prompt_length 4, top_layers 1, gate scalar" in capsys.readouterr().out
    assert torch.equal(logits(None, tmp_path / "out"), logits(None, peft_folder))


def test_the_script_says_where_it_went_and_what_comes_next(peft_folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "launch/import_adapter.py", "--adapter", peft_folder, "--output", tmp_path / "out"],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python launch/generate.py --adapter {tmp_path / 'out'} --prompt TEXT" in done.stdout


def test_mistakes_are_one_line_and_nothing_is_written(peft_folder, litgpt_file, tmp_path, capsys):
    save_adapted(tmp_path / "ours", BASE, version="v1")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("keep me", encoding="utf-8")
    (tmp_path / "weights.pth").write_bytes(b"PK nothing")
    for adapter, output, line in (
        (tmp_path / "nowhere", "out", "no such file or folder"),
        (tmp_path / "ours", "out", "an adapter folder of this project already"),
        (tmp_path / "weights.pth", "out", "weights.pth: "),
        (peft_folder, "notes", "not empty"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run("--adapter", adapter, "--output", tmp_path / output, "--overwrite")
        said = capsys.readouterr().err
        assert said.startswith("error: --")
        assert line in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "notes" / "todo.txt").read_text(encoding="utf-8") == "keep me"
