"""Loading is strict, streams shard by shard, and gives transformers' own logits to the bit."""

import json
from pathlib import Path

import pytest
import torch
from adapted_models import tokens
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from sparse_llama.errors import ModelError
from sparse_llama.model.files import resolve_model
from sparse_llama.model.llama import load_llama

BASES = {
    "gqa, explicit head_dim": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "padding token": {"pad_token_id": 0},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama 3 scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def write_bin_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write ``tensors`` as open_llama's are: two ``.bin`` shards and an index, with rotary buffers that
    nothing needs."""
    names = sorted(tensors)
    shards = {
        "pytorch_model-00001-of-00002.bin": {name: tensors[name] for name in names[::2]},
        "pytorch_model-00002-of-00002.bin": {name: tensors[name] for name in names[1::2]}
        | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)},
    }
    for file, shard in shards.items():
        torch.save(shard, folder / file)
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


@pytest.fixture
def checkpoint(tiny_llama, tmp_path):
    """Return a function that saves a tiny model as ``kind`` and returns its folder."""

    def save(kind: str = "safetensors", **overrides) -> Path:
        model = tiny_llama(**overrides)
        model.save_pretrained(tmp_path, max_shard_size="30KB" if kind == "safetensors shards" else "1GB")
        if kind == "bin shards":
            tensors = load_file(tmp_path / "model.safetensors")
            (tmp_path / "model.safetensors").unlink()
            write_bin_shards(tmp_path, tensors)
        return tmp_path

    return save


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_llama(str(folder), dtype=torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["safetensors", "safetensors shards", "bin shards"])
def test_logits_are_transformers_own_to_the_bit(checkpoint, tiny_llama, kind, base):
    folder = checkpoint(kind, **BASES[base])
    ours = load_llama(str(folder), dtype=torch.float32).model
    # transformers reports the rotary buffer of the .bin shards as unexpected; the model that was saved has
    # none
    theirs = (
        tiny_llama(**BASES[base]) if kind == "bin shards" else LlamaForCausalLM.from_pretrained(folder).eval()
    )
    assert torch.equal(ours(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits)


def test_bin_shards_hold_what_was_saved(checkpoint, tiny_llama):
    folder = checkpoint("bin shards")
    expected = tiny_llama().state_dict()
    for name, tensor in load_llama(str(folder), dtype=torch.float32).model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_old_bin_format_is_read_too(checkpoint, tiny_llama):
    folder = checkpoint()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(
        load_llama(str(folder), dtype=torch.float32).model.lm_head.weight, tiny_llama().lm_head.weight
    )


def test_weights_are_cast_and_rotary_frequencies_are_not(checkpoint, tiny_llama):
    """In bf16 the frequencies are wrong by up to 0.4%: 4 radians at token 1,000."""
    model = load_llama(str(checkpoint()), dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny_llama().model.rotary_emb.inv_freq)
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight.bfloat16())


def test_tied_weights_stay_one_parameter(checkpoint):
    model = load_llama(str(checkpoint(tie_word_embeddings=True)), dtype=torch.float32).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nothing_refers_to_the_file_after_loading(checkpoint):
    folder = checkpoint()
    model = load_llama(str(folder), dtype=torch.float32).model
    before = model(input_ids=tokens()).logits
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place: a mapped tensor would change too
    assert torch.equal(model(input_ids=tokens()).logits, before)


def test_a_renamed_tensor_is_refused(checkpoint):
    """T1: what ``strict=False`` hid from everyone."""
    folder = checkpoint()
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"model.layers.1.mlp.up.weight": tensors.pop("model.layers.1.mlp.up_proj.weight")}
        ),
    )
    message = refusal(folder)
    assert "1 tensors missing (first model.layers.1.mlp.up_proj.weight)" in message
    assert "1 tensors unexpected (first model.layers.1.mlp.up.weight)" in message


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_refused(checkpoint, name):
    folder = checkpoint()
    rewrite(folder, lambda tensors: tensors.pop(name))
    assert f"1 tensors missing (first {name})" in refusal(folder)


def test_a_tensor_of_another_shape_is_refused(checkpoint):
    folder = checkpoint()
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(62, 32)}))
    assert "lm_head.weight has shape [62, 32], config.json says [61, 32]" in refusal(folder)


def test_a_tied_model_whose_head_differs_is_refused_and_one_with_a_copy_is_not(checkpoint, tiny_llama):
    folder = checkpoint(tie_word_embeddings=True)
    rewrite(
        folder,
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    load_llama(str(folder), dtype=torch.float32)
    rewrite(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    )
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(folder)


def test_a_missing_shard_is_named(checkpoint):
    folder = checkpoint("bin shards")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert "1 of 2 shards are missing (first pytorch_model-00002-of-00002.bin)" in refusal(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin shards"])
def test_a_truncated_file_is_refused(checkpoint, kind):
    folder = checkpoint(kind)
    path = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "not a complete safetensors file" in (said := refusal(folder)) or "or not all of it" in said


def test_a_bin_file_with_code_in_it_is_not_run(checkpoint, tmp_path):
    folder = checkpoint("bin shards")
    torch.save({"model.norm.weight": Path("/")}, folder / "pytorch_model-00001-of-00002.bin")
    assert "holds a pathlib.PosixPath, which only code in the file could make" in refusal(folder)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert """model_type is 'gpt2'; only "llama" can be adapted""" in refusal(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path, tiny_config):
    assert "no config.json" in refusal(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    assert "no weights; expected model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "no such folder; give a local folder, a hub id"),
        ("./models/llama", "no such folder"),
        ("nobody/no-such-model", "nobody/no-such-model: not a local folder, and not available from the hub"),
        ("bundled:gpt", "no bundled model 'bundled:gpt'"),
    ],
)
def test_a_model_that_is_nowhere_is_said_in_one_line(model, message):
    with pytest.raises(ModelError) as caught:
        resolve_model(model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_weights_are_transformers_initialisation_and_are_said(tmp_path, tiny_config):
    tiny_config(initializer_range=0.02, hidden_size=256, attention_bias=True).save_pretrained(tmp_path)
    loaded = load_llama(str(tmp_path), dtype=torch.float32, random_weights=True, seed=3)
    assert "RANDOM weights, seed 3" in loaded.notices[0]
    for name, parameter in loaded.model.named_parameters():
        if parameter.dim() == 2:
            assert abs(parameter.std() / 0.02 - 1) < 0.05, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    again = load_llama(str(tmp_path), dtype=torch.float32, random_weights=True, seed=3).model
    assert torch.equal(again.lm_head.weight, loaded.model.lm_head.weight)
    other = load_llama(str(tmp_path), dtype=torch.float32, random_weights=True, seed=4).model
    assert not torch.equal(other.lm_head.weight, loaded.model.lm_head.weight)


@pytest.mark.real_data
def test_stories260k_is_transformers_own_to_the_bit(shared):
    folder = shared / "models" / "stories260K"
    ids = tokens(num_tokens=40, vocabulary=512)
    ours = load_llama(str(folder), dtype=torch.float32).model
    assert torch.equal(
        ours(input_ids=ids).logits, LlamaForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    )


PEAK = """
import resource, sys, torch
from sparse_llama.model.llama import load_llama
import transformers.models.llama.modeling_llama
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_llama(sys.argv[1], dtype=torch.bfloat16).model
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def test_peak_memory_is_the_model_and_one_shard(tiny_llama, tmp_path, run_python):
    """The checkpoint is 64 MB in fp32, in 4 shards; the model 32 MB in bf16. Both at once would be 96 MB."""
    model = tiny_llama(vocab_size=16000, hidden_size=512)
    model.save_pretrained(tmp_path, max_shard_size="17MB")
    tensors = {
        name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    write_bin_shards(tmp_path, tensors)
    growth, size = map(int, run_python(PEAK, str(tmp_path)).split())
    largest_shard = max(path.stat().st_size for path in tmp_path.glob("*.bin"))
    assert growth < size + largest_shard + 30e6  # 30 MB: code paths that are imported on the way
