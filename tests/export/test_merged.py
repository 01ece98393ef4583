"""A merged export is a plain folder that computes what the adapted model computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from adapted_models import tokens, trainable_state
from exported_runs import BUNDLED, LAYOUT, MASTER_LENGTH, VOCAB_SIZE, ids, open_export
from oracles.adapter_formula import adapted_logits
from oracles.masked_attention import relative_error
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.errors import CheckpointError, ExportError
from sparse_llama.export import export_merged
from sparse_llama.export import write as write_module

BASES = {
    "gqa, explicit head_dim": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
}


@torch.no_grad()
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_export_computes_the_formula_of_the_adapter(trained_run, tmp_path, version, base):
    """Oracle: the adapter's formulas in fp64, written out without modules."""
    run = trained_run(version, **BASES[base])
    export_merged(run.folder, tmp_path / "out")
    weights = {name: tensor.double() for name, tensor in run.model.state_dict().items()}
    expected = adapted_logits(weights, run.model.config, ids())
    assert relative_error(open_export(tmp_path / "out")(input_ids=ids()).logits, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_sparse_export_computes_what_the_sparse_model_does_and_not_the_dense_one(
    trained_run, tmp_path, version
):
    run = trained_run(version, layout=LAYOUT)
    export_merged(run.folder, tmp_path / "out")
    layout = run.model.model.layers[0].self_attn.attention_plan.layout(0, MASTER_LENGTH)
    assert layout.density_at(MASTER_LENGTH) < 0.5
    exported = open_export(tmp_path / "out")
    batch = ids(MASTER_LENGTH)
    assert relative_error(exported(input_ids=batch).logits, run.model(input_ids=batch).logits) < 1e-5
    weights = {name: tensor.double() for name, tensor in run.model.state_dict().items()}
    dense = adapted_logits(weights, run.model.config, batch)
    assert relative_error(exported(input_ids=batch).logits, dense) > 1e-2


ISOLATED = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparse_llama":
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)  # asks about the code; no one answers, none is needed
    ids = torch.load(sys.argv[1])
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        found = model(input_ids=ids).logits, answer, tokenizer("Hi,  there\\n").input_ids
    torch.save(found, folder + ".pt")
assert not [name for name in sys.modules if name.split(".")[0] == "sparse_llama"]
"""


@torch.no_grad()
def test_transformers_alone_opens_an_export_and_generates_as_the_adapted_model(trained_run, tmp_path):
    """In a process where sparse_llama cannot be imported."""
    models = {}
    for name, layout in (("dense", None), ("sparse", LAYOUT)):
        run = trained_run("v2", layout=layout)
        export_merged(run.folder, tmp_path / name)
        models[name] = run.model
    torch.save(ids(20), tmp_path / "ids.pt")
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED, tmp_path / "ids.pt", *(tmp_path / name for name in models)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    processor = sentencepiece.SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer.model"))
    for name, model in models.items():
        logits, answer, words = torch.load(tmp_path / f"{name}.pt")
        assert relative_error(logits, model(input_ids=ids(20)).logits) < 1e-5
        expected = ids(20)
        for _ in range(12):  # no cache: every token from the whole prefix
            following = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, following[:, None]], 1)
        assert torch.equal(answer, expected)
        assert words == [processor.bos_id(), *processor.encode("Hi,  there\n")]


@pytest.mark.parametrize(
    ("layout", "change", "needs_code"),
    [
        (None, "nothing", True),
        (None, "gates to zero", True),
        (None, "gates and head bias to zero", False),
        (LAYOUT, "gates and head bias to zero", True),
        ({"mode": "dense", "block": 4}, "gates and head bias to zero", False),
    ],
)
def test_code_is_shipped_only_where_plain_llama_cannot_hold_the_model(
    trained_run, tmp_path, layout, change, needs_code
):
    def zero(model):
        for name, parameter in model.named_parameters():
            is_gate = "gates" in change and name.endswith("zero_init.gate")
            if is_gate or ("bias" in change and name == "lm_head.adapter_bias"):
                parameter.zero_()

    run = trained_run("v2", layout=layout, change=zero)
    exported = export_merged(run.folder, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported.needs_code == needs_code
    assert (tmp_path / "out" / "modeling_sparse_llama.py").exists() == needs_code
    assert ("auto_map" in document) == needs_code
    assert document["model_type"] == ("sparse_llama" if needs_code else "llama")
    if not needs_code:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert type(model.config) is LlamaConfig
        assert relative_error(model(input_ids=ids()).logits, run.model(input_ids=ids()).logits) < 1e-5


def test_a_tied_embedding_is_untied_exactly_where_the_head_has_a_scale(trained_run, tmp_path):
    tied = {"tie_word_embeddings": True}
    export_merged(trained_run("v1", **tied).folder, tmp_path / "v1")
    assert "lm_head.weight" not in load_file(tmp_path / "v1" / "model.safetensors")

    def unscale(model):
        model.lm_head.adapter_scale.fill_(1)

    export_merged(trained_run("v2", change=unscale, **tied).folder, tmp_path / "unscaled")
    tensors = load_file(tmp_path / "unscaled" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert "lm_head.bias" in tensors

    run = trained_run("v2", **tied)
    export_merged(run.folder, tmp_path / "v2")
    tensors = load_file(tmp_path / "v2" / "model.safetensors")
    embedding, scale = run.model.model.embed_tokens.weight, run.model.lm_head.adapter_scale
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding)
    assert torch.equal(tensors["lm_head.weight"], embedding * scale[:, None])


@pytest.mark.parametrize("layout", [None, LAYOUT], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_export_is_as_near_as_the_adapted_model_in_16_bits(trained_run, tmp_path, dtype, layout):
    run = trained_run("v2", layout=layout, dtype=dtype)
    exported = export_merged(run.folder, tmp_path / "out")
    kind = getattr(torch, dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {kind} | ({torch.int64} if layout else set())
    expected = run.model(input_ids=ids()).logits
    model = open_export(tmp_path / "out")  # in the type that config.json names
    assert model.dtype == kind
    unmerged = relative_error(run.model.to(kind)(input_ids=ids()).logits, expected)
    assert relative_error(model(input_ids=ids()).logits, expected) <= 1.5 * unmerged
    assert exported.errors.prefill <= exported.limits.prefill < 0.5


def test_dtype_overrides_what_the_run_computed_in(trained_run, tmp_path):
    run = trained_run("v2", dtype="bfloat16")
    export_merged(run.folder, tmp_path / "out", dtype=torch.float32)
    assert open_export(tmp_path / "out").dtype == torch.float32


def test_weights_are_folded_in_fp32_and_rounded_once(trained_run, tmp_path):
    run = trained_run("v2", dtype="bfloat16")
    export_merged(run.folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    layer = run.model.model.layers[0].mlp.up_proj
    once = (layer.weight.double() * layer.adapter_scale.double()[:, None]).float().bfloat16()
    twice = (layer.weight.bfloat16() * layer.adapter_scale.bfloat16()[:, None]).bfloat16()
    assert torch.equal(found, once)
    assert not torch.equal(found, twice)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_tensors_give_the_same_bytes(trained_run, tmp_path):
    """However base and adapter are cut up or ordered in their files."""
    run = trained_run("v2", layout=LAYOUT)
    export_merged(run.folder, tmp_path / "first")
    export_merged(run.folder, tmp_path / "second")
    assert folder_bytes(tmp_path / "first") == folder_bytes(tmp_path / "second")
    sharded = trained_run("v2", layout=LAYOUT, max_shard_size="60KB")
    (sharded.base / "model.safetensors").unlink()
    assert len(list(sharded.base.glob("model-*.safetensors"))) > 3
    export_merged(sharded.folder, tmp_path / "third")
    assert folder_bytes(tmp_path / "first") == folder_bytes(tmp_path / "third")


def test_a_base_in_bin_shards_gives_the_same_bytes(trained_run, tmp_path):
    run = trained_run("v2", attention_bias=True)
    export_merged(run.folder, tmp_path / "first")
    tensors = load_file(run.base / "model.safetensors")
    (run.base / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)  # biases after weights here
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, its in shards.items():
        torch.save({name: tensors[name] for name in its}, run.base / file)
    weight_map = {name: file for file, its in shards.items() for name in its}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (run.base / "pytorch_model.bin.index.json").write_text(index)
    export_merged(run.folder, tmp_path / "second")
    assert folder_bytes(tmp_path / "first") == folder_bytes(tmp_path / "second")


def test_shards_are_no_larger_than_asked_and_open(trained_run, tmp_path):
    run = trained_run("v2", layout=LAYOUT)
    export_merged(run.folder, tmp_path / "out", max_shard_bytes=200_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= 200_000
    whole = run.model(input_ids=ids()).logits
    assert relative_error(open_export(tmp_path / "out")(input_ids=ids()).logits, whole) < 1e-5


PEAK = """
import resource, sys, torch
from pathlib import Path
from sparse_llama.adapters.weights import read_adapter_folder
from sparse_llama.export.merged import plan_merge
from sparse_llama.export.write import _write_model
from sparse_llama.model.configuration import read_config
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base, adapter, out = map(Path, sys.argv[1:])
file, tensors = read_adapter_folder(adapter)
config = read_config(base)
merged = plan_merge(config, file.adapter, tensors, [None] * config.num_hidden_layers)
torch.ones(100, 100) @ torch.ones(100, 100)
before = peak()
_write_model(merged, base, out, torch.float32, 10**9)
print(peak() - before, sum(path.stat().st_size for path in out.glob("*.safetensors")))
"""


def test_no_more_than_a_shard_of_the_base_is_in_memory(trained_run, tmp_path, run_python):
    """The model is 75 MB in 8 shards and its largest tensor 5 MB; at once, in and out, it would be 150 MB."""
    run = trained_run("v2", hidden_size=896, intermediate_size=1400, max_shard_size="10MB")
    (tmp_path / "out").mkdir()
    growth, size = map(
        int, run_python(PEAK, str(run.base), str(run.folder / "adapter"), str(tmp_path / "out")).split()
    )
    assert size > 70e6
    assert growth < 35e6  # one mapped shard, one tensor in three precisions, code imported on the way


@pytest.mark.parametrize("layout", [None, LAYOUT], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.down_proj.weight", "lm_head.bias", "model.layers.2.self_attn.prompt.value"]
)
def test_an_export_with_a_damaged_tensor_is_refused_and_leaves_nothing(
    trained_run, tmp_path, monkeypatch, name, layout
):
    real = write_module.merged_tensors

    def damaged(merged, folder):
        for output, tensor in real(merged, folder):
            yield output, tensor * 1.01 if output == name else tensor

    monkeypatch.setattr(write_module, "merged_tensors", damaged)
    run = trained_run("v2", layout=layout)
    with pytest.raises(ExportError, match=r"relative error .* over .* tokens, allowed 1\.0e-05") as caught:
        export_merged(run.folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_an_export_with_another_layout_is_refused(trained_run, tmp_path, monkeypatch):
    real = write_module.merged_tensors

    def other(merged, folder):
        for output, tensor in real(merged, folder):
            yield output, tensor.flip(0) if output == "layouts.0.head_patterns" else tensor

    monkeypatch.setattr(write_module, "merged_tensors", other)
    with pytest.raises(ExportError, match="head_patterns of the export is not that of the adapted model"):
        export_merged(trained_run("v2", layout=LAYOUT).folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_weights_that_overflow_in_fp16_are_refused(trained_run, tmp_path):
    def enlarge(model):
        model.model.layers[1].mlp.down_proj.adapter_scale.fill_(1e6)

    run = trained_run("v2", dtype="bfloat16", change=enlarge)
    with pytest.raises(ExportError, match="nan"):
        export_merged(run.folder, tmp_path / "out", dtype=torch.float16)


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(trained_run, tmp_path, tiny_llama):
    run = trained_run("v2")
    tiny_llama(vocab_size=VOCAB_SIZE, intermediate_size=50).save_pretrained(run.base)
    with pytest.raises(CheckpointError, match="it was trained on another base"):
        export_merged(run.folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.real_data
def test_stories260k_with_an_adapter_exports(shared, trained_run, tmp_path):
    run = trained_run("v1")
    from sparse_llama.adapters.attach import attach_adapters, trainable_parameters
    from sparse_llama.adapters.weights import read_adapter_folder, write_adapter_folder
    from sparse_llama.attention.interface import AttentionPlan, attach_attention
    from sparse_llama.model.llama import load_llama

    base = str(shared / "models" / "stories260K")
    model = load_llama(base, dtype=torch.float32).model
    attach_attention(model, AttentionPlan((None,) * model.config.num_hidden_layers))
    file, _ = read_adapter_folder(run.folder / "adapter")
    attach_adapters(model, file.adapter, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    write_adapter_folder(run.folder / "adapter", trainable_state(model), file)
    export_merged(run.folder, tmp_path / "out", model=base)
    batch = tokens(2, 30, 512)
    with torch.no_grad():
        assert (
            relative_error(open_export(tmp_path / "out")(input_ids=batch).logits, model(batch).logits) < 1e-5
        )
