"""Exports for other programs: written, read back, refused where the format has no word for something."""

import pytest
import torch
from exported_runs import LAYOUT, formula, ids
from oracles.masked_attention import relative_error
from transformers import AutoModelForCausalLM

from sparse_llama.adapters.interop import read_foreign
from sparse_llama.adapters.weights import read_adapter_folder
from sparse_llama.errors import CheckpointError, ExportError
from sparse_llama.export import export_foreign, export_merged, export_native

MHA = {"num_key_value_heads": 4, "head_dim": 8}
FILES = {
    "peft": ["adapter_config.json", "adapter_model.safetensors"],
    "lit-llama": ["lit-llama-adapter-finetuned.pth"],
    "litgpt": ["lit_model.pth.adapter"],
    "llama-adapter": ["adapter.pth"],
}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def scalar_run(trained_run):
    """Return a v1 run that every format can hold: one small gate per layer, as many key as query heads."""

    def shrink(model):
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.mul_(0.5)

    def make(**keywords):
        return trained_run("v1", adapter={"gate": "scalar"}, change=shrink, **(MHA | keywords))

    return make


@pytest.mark.parametrize("format", FILES)
def test_a_format_has_its_own_files_and_its_adapter_exports_on(scalar_run, tmp_path, format):
    """Into a merged model, which computes the formula of the adapter that it began as."""
    run = scalar_run()
    exported = export_foreign(format, run.folder, tmp_path / "theirs")
    assert names(tmp_path / "theirs") == FILES[format]
    assert exported.rows()[1] == ("format", format)
    again = export_merged(tmp_path / "theirs", tmp_path / "merged", model=str(run.base), dtype=torch.float32)
    assert again.needs_code
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
        assert relative_error(found(input_ids=ids()).logits, formula(run, {})) < 1e-5


def test_peft_opens_its_export_and_computes_the_same(scalar_run, tmp_path):
    peft = pytest.importorskip("peft")
    run = scalar_run()
    exported = export_foreign("peft", run.folder, tmp_path / "out")
    assert exported.opens_with.startswith(
        f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{run.base}")'
    )
    base = AutoModelForCausalLM.from_pretrained(run.base)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        assert relative_error(model(input_ids=ids()).logits, formula(run, {})) < 1e-5


@pytest.mark.parametrize("format", FILES)
def test_a_sparse_layout_is_refused_unless_it_is_left_out(scalar_run, tmp_path, format, write_run_json):
    run = scalar_run(layout=LAYOUT)
    with pytest.raises(ExportError, match=r"has no word for the layout .*--dense_attention"):
        export_foreign(format, run.folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    write_run_json(run.folder)
    exported = export_foreign(format, run.folder, tmp_path / "out", dense_attention=True)
    assert exported.losses is not None
    assert exported.losses.trained != exported.losses.exported
    assert names(tmp_path / "out") == FILES[format]


def test_what_a_format_cannot_hold_is_refused_with_the_reason(trained_run, tmp_path):
    per_head = trained_run("v1", **MHA)
    with pytest.raises(ExportError, match="PEFT has one gate per layer"):
        export_foreign("peft", per_head.folder, tmp_path / "out")
    v2 = trained_run("v2", **MHA)
    with pytest.raises(ExportError, match="v1 only"):
        export_foreign("peft", v2.folder, tmp_path / "out")
    with pytest.raises(ExportError, match="there is no layout to leave out"):
        export_foreign("litgpt", v2.folder, tmp_path / "out", dense_attention=True)
    assert not list(tmp_path.glob("out*"))


def test_litgpts_own_function_is_told(trained_run, tmp_path):
    rows = export_foreign("litgpt", trained_run("v2").folder, tmp_path / "out").rows()
    assert any(label == "note" and "computes another function" in value for label, value in rows)


@pytest.mark.parametrize("kind", ["prompt", "gate", "adapter_scale"])
def test_what_reads_back_differently_is_refused_and_leaves_nothing(trained_run, tmp_path, monkeypatch, kind):
    from sparse_llama.export import foreign

    real = foreign.write_foreign

    def damaged(format, folder, settings, tensors, base, *, base_model):
        last = max(name for name in tensors if name.endswith(kind))
        changed = tensors | {last: tensors[last] * 1.001}
        return real(format, folder, settings, changed, base, base_model=base_model)

    monkeypatch.setattr(foreign, "write_foreign", damaged)
    with pytest.raises(ExportError, match=f"{kind} reads back differently; nothing was written"):
        export_foreign("litgpt", trained_run("v2").folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_gates_that_went_through_tanh_and_back_are_the_same(trained_run, tmp_path):
    run = trained_run("v1", adapter={"gate_activation": "tanh"}, **MHA)
    export_foreign("lit-llama", run.folder, tmp_path / "out")
    read = read_foreign(tmp_path / "out", run.model.config)
    gate = run.model.model.layers[3].self_attn.zero_init.gate
    name = "model.layers.3.self_attn.zero_init.gate"
    torch.testing.assert_close(read.tensors[name], gate.tanh(), rtol=1e-6, atol=0)


def test_another_programs_adapter_becomes_a_native_one(scalar_run, tmp_path):
    run = scalar_run()
    export_foreign("lit-llama", run.folder, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="does not name its base; give it with --model"):
        export_native(tmp_path / "theirs", tmp_path / "native")
    export_native(tmp_path / "theirs", tmp_path / "native", model=str(run.base))
    file, tensors = read_adapter_folder(tmp_path / "native")
    assert file.base_model.path == str(run.base)
    _, trained = read_adapter_folder(run.folder / "adapter")
    assert tensors.keys() == trained.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in trained.items())


def test_overwrite_replaces_another_programs_files(scalar_run, tmp_path):
    run = scalar_run()
    for format in FILES:
        export_foreign(format, run.folder, tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == FILES["llama-adapter"]
