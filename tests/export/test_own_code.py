"""Our own commands run a folder's code unasked only when it is byte for byte what this version ships."""

import json
import sys

import pytest
import torch
from exported_runs import LAYOUT, ids
from oracles.masked_attention import relative_error
from safetensors.torch import load_file, save_file

from sparse_llama.errors import ModelError
from sparse_llama.export import export_merged
from sparse_llama.generation import longest_sequence
from sparse_llama.model.assemble import is_own_modelling_code, open_model

CODE = "modeling_sparse_llama.py"


@pytest.fixture
def exported(trained_run, tmp_path):
    """Return an export's folder and the adapted model."""
    run = trained_run("v2", layout=LAYOUT)
    export_merged(run.folder, tmp_path / "out")
    return tmp_path / "out", run.model


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def test_an_export_opens_unasked_and_computes_the_same(exported):
    folder, adapted = exported
    assert is_own_modelling_code(folder)
    before = set(sys.modules)
    opened = open_model(str(folder)).model
    assert relative_error(opened(input_ids=ids()).logits, adapted(input_ids=ids()).logits) < 1e-5
    assert type(opened).__module__ == "sparse_llama.model.exported.modeling_sparse_llama"
    assert not [name for name in set(sys.modules) - before if name.startswith("transformers_modules")]
    assert longest_sequence(opened)[0] == 64


def change_a_byte(folder):
    path = folder / CODE
    path.write_bytes(path.read_bytes().replace(b"softmax(-1)", b"softmax(-2)", 1))


CHANGES = {
    "one byte": change_a_byte,
    "another file of code": lambda folder: (folder / "helper.py").write_text(""),
    "code in a folder": lambda folder: (
        (folder / "custom_generate").mkdir(),
        (folder / "custom_generate" / "generate.py").write_text(""),
    ),
    "another module": lambda folder: edit_config(folder, auto_map={"AutoModelForCausalLM": "other.Model"}),
    "another repository": lambda folder: edit_config(
        folder,
        auto_map={"AutoModelForCausalLM": "someone/else--modeling_sparse_llama.SparseLlamaForCausalLM"},
    ),
    "a list": lambda folder: edit_config(folder, auto_map=["modeling_sparse_llama.SparseLlamaForCausalLM"]),
    "no code": lambda folder: (folder / CODE).unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_code_is_refused_in_one_line(exported, change):
    folder, _ = exported
    CHANGES[change](folder)
    assert not is_own_modelling_code(folder)
    with pytest.raises(ModelError, match="--trust_remote_code") as caught:
        open_model(str(folder))
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_other_code_runs_when_it_is_trusted(exported):
    folder, adapted = exported
    change_a_byte(folder)
    opened = open_model(str(folder), trust_remote_code=True).model
    assert relative_error(opened(input_ids=ids()).logits, adapted(input_ids=ids()).logits) > 1e-3


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.prompt.gate", "layouts.0.starts", "lm_head.bias"])
def test_an_export_with_a_missing_tensor_is_refused(exported, name):
    folder, _ = exported
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 missing tensors \\(first {name}\\)"):
        open_model(str(folder))


def test_an_export_with_a_truncated_file_is_refused(exported):
    folder, _ = exported
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="does not open"):
        open_model(str(folder))
