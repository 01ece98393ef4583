"""Where exports come from and go to; nothing is destroyed or half written."""

import json
import shutil

import pytest
import torch
from exported_runs import BUNDLED
from safetensors.torch import load_file

from sparse_llama.errors import CheckpointError, ExportError
from sparse_llama.export import export_merged, export_native, publish
from sparse_llama.export.publish import check_output
from sparse_llama.export.source import find_source, locate


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_an_adapter_and_a_checkpoint_are_found(trained_run):
    folder = trained_run("v1").folder
    step = folder / "checkpoints" / "step_000007"
    shutil.copytree(folder / "adapter", step)
    assert locate(folder) == folder / "adapter"
    assert locate(folder / "adapter") == folder / "adapter"
    assert locate(step) == step


def test_a_run_without_an_adapter_names_its_newest_checkpoint(trained_run):
    folder = trained_run("v1").folder
    for number in (2, 11):
        shutil.copytree(folder / "adapter", folder / "checkpoints" / f"step_{number:06d}")
    shutil.rmtree(folder / "adapter")
    with pytest.raises(CheckpointError, match=r"--checkpoint .*has not finished.*step_000011"):
        locate(folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"^--checkpoint .*exactly one adapter file"):
        find_source(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"^--checkpoint .*no such file or folder"):
        find_source(tmp_path / "nothing", None)


def test_a_native_export_holds_the_fp32_masters_and_their_configuration(trained_run, tmp_path):
    run = trained_run("v2", dtype="bfloat16")
    export_native(run.folder, tmp_path / "out")
    assert names(tmp_path / "out") == ["adapter.safetensors", "adapter_config.json"]
    for name in names(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (run.folder / "adapter" / name).read_bytes()
    tensors = load_file(tmp_path / "out" / "adapter.safetensors")
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert tensors.keys() == trained.keys()
    assert all(torch.equal(tensors[name], parameter) for name, parameter in trained.items())


def test_a_merged_export_holds_these_files_and_no_others(trained_run, tmp_path):
    run = trained_run("v1")
    (run.base / "generation_config.json").write_text('{"do_sample": false}')
    export_merged(run.folder, tmp_path / "exports" / "out")
    assert names(tmp_path / "exports") == ["out"]
    assert names(tmp_path / "exports" / "out") == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_sparse_llama.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("is_plain", [True, False])
def test_code_that_a_base_brought_is_not_passed_on(trained_run, tmp_path, is_plain):
    def zero_gates(model):
        for name, parameter in model.named_parameters():
            if is_plain and name.endswith("zero_init.gate"):
                parameter.zero_()

    run = trained_run("v1", change=zero_gates)
    path = run.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "their.Config"}}))
    export_merged(run.folder, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    ours = {"modeling_sparse_llama.SparseLlamaConfig", "modeling_sparse_llama.SparseLlamaForCausalLM"}
    assert set(document.get("auto_map", {}).values()) == (set() if is_plain else ours)


def test_an_export_is_replaced_with_overwrite_only(trained_run, tmp_path):
    run = trained_run("v1")
    export_native(run.folder, tmp_path / "out")
    (tmp_path / "out" / "of the old one").touch()
    with pytest.raises(ExportError, match="not empty; replace it with --overwrite"):
        export_native(run.folder, tmp_path / "out")
    assert "of the old one" in names(tmp_path / "out")
    export_native(run.folder, tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == ["adapter.safetensors", "adapter_config.json"]
    assert not [name for name in names(tmp_path) if name.startswith("out_")]


def test_overwrite_does_not_replace_what_is_no_export(trained_run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(ExportError, match="no export that --overwrite may replace"):
        export_native(trained_run("v1").folder, tmp_path / "thesis", overwrite=True)
    assert names(tmp_path / "thesis") == ["chapter1.tex"]


def test_an_output_that_is_or_holds_a_source_is_refused(trained_run, tmp_path):
    run = trained_run("v1")
    for output in (run.base, run.folder, run.folder / "adapter", tmp_path):
        with pytest.raises(ExportError, match="which is exported; name another folder"):
            export_merged(run.folder, output, overwrite=True)
    assert (run.base / "model.safetensors").exists()
    check_output(run.folder / "export", overwrite=False, sources=(run.folder / "adapter", run.base))


def test_a_file_in_the_outputs_place_is_refused(trained_run, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ExportError, match="a file; name a folder"):
        export_native(trained_run("v1").folder, tmp_path / "out")


def test_a_full_disk_is_one_line_and_keeps_the_old_export(trained_run, tmp_path, monkeypatch):
    run = trained_run("v1")
    export_merged(run.folder, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparse_llama.export.shards.ShardWriter.write", full)
    with pytest.raises(ExportError, match=r"cannot be written .*No space left on device"):
        export_merged(run.folder, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert not [name for name in names(tmp_path) if name.startswith("out_")]


def test_nothing_appears_under_the_name_before_it_is_complete(tmp_path):
    with publish.publishing(tmp_path / "out") as unfinished:
        (unfinished / "config.json").touch()
        assert not (tmp_path / "out").exists()
    assert names(tmp_path / "out") == ["config.json"]


def test_an_adapter_whose_base_has_no_tokenizer_is_refused(trained_run, tmp_path):
    run = trained_run("v1")
    (run.base / "tokenizer.model").unlink()
    from sparse_llama.errors import DataError

    with pytest.raises(DataError, match="no tokenizer"):
        export_merged(run.folder, tmp_path / "out")
    assert (BUNDLED / "tokenizer.model").exists()
