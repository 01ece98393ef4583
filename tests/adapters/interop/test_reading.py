"""Which files are whose, in the many ways that they are kept, and what is refused with a reason."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from sparse_llama.adapters.interop import named_base, read_foreign, recognise
from sparse_llama.errors import CheckpointError

Make = Callable[..., LlamaConfig]
MHA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
WIDTH, HEADS, LAYERS, INNER, VOCABULARY = 32, 4, 4, 48, 61
GATE = "model.layers.{}.self_attn.zero_init.gate"
PROMPT = "model.layers.{}.self_attn.zero_init.prompt"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lit_v1(gate_shape: tuple[int, ...] = (1, HEADS, 1, 1), first: int = 2) -> dict[str, torch.Tensor]:
    """Return a v1 adapter as lit-llama and litgpt name it."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(first, LAYERS):
        tensors[f"transformer.h.{layer}.attn.adapter_wte.weight"] = random(3, WIDTH) + layer
        tensors[f"transformer.h.{layer}.attn.gating_factor"] = random(*gate_shape) + layer
    return tensors


def lit_v2(modules: dict[str, int], norms: tuple[str, str], last: str) -> dict[str, torch.Tensor]:
    """Return lit_v1 with scales and biases on ``modules``, by their outputs, and norms."""
    tensors = lit_v1()
    for layer in range(LAYERS):
        for module, size in modules.items():
            for number, kind in enumerate(("adapter_scale", "adapter_bias")):
                tensors[f"transformer.h.{layer}.{module}.{kind}"] = random(size) + number
        tensors |= {f"transformer.h.{layer}.{norm}": random(WIDTH) for norm in norms}
    return tensors | {last: random(WIDTH)}


def original_v1(num_rows: int, trained: range, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the original's table of prompts, and gates that have moved in ``trained`` only."""
    gates = {
        f"{prefix}layers.{layer}.attention.gate": random(1, HEADS, 1, 1) * (layer in trained)
        for layer in range(LAYERS)
    }
    return {"adapter_query.weight": random(num_rows, WIDTH)} | gates


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("lit_v1_adapter.safetensors", "lit-llama"),
        ("lit_v2_adapter.safetensors", "lit-llama"),
        ("ogv_v1_adapter.safetensors", "llama-adapter"),
        ("ogv_mm7b_text_adapter.safetensors", "llama-adapter"),
        ("peft_gqa_adapter/adapter_model.safetensors", "peft"),
    ],
)
def test_their_files_are_recognised_whatever_they_are_called(shared: Path, tmp_path, name, format):
    (tmp_path / "x.safetensors").write_bytes((shared / "golden" / "adapters" / name).read_bytes())
    assert recognise(tmp_path / "x.safetensors") == format
    assert recognise(tmp_path) == format


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pickled_file_of_any_age_and_dtype_gives_fp32(tiny_config: Make, tmp_path, is_zip, dtype):
    tensors = {name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in lit_v1().items()}
    file = tmp_path / "lit-llama-adapter-finetuned.pth"
    torch.save(tensors, file, _use_new_zipfile_serialization=is_zip)
    read = read_foreign(tmp_path, tiny_config(**MHA))
    assert (read.format, read.settings.version, read.settings.start_layer) == ("lit-llama", "v1", 2)
    assert {tensor.dtype for tensor in read.tensors.values()} == {torch.float32}
    expected = tensors["transformer.h.3.attn.adapter_wte.weight"].detach().float()
    assert torch.equal(read.tensors[PROMPT.format(3)], expected)
    file.write_bytes(b"")  # a tensor that still lay in the file would end the process here
    assert torch.equal(read.tensors[PROMPT.format(3)], expected)


def test_lit_llamas_first_files_have_one_gate_per_layer(tiny_config: Make, tmp_path):
    tensors = lit_v1(gate_shape=(1,))
    torch.save(tensors, tmp_path / "a.pth")
    read = read_foreign(tmp_path, tiny_config(**MHA))
    assert (read.format, read.settings.gate) == ("lit-llama", "scalar")
    assert torch.equal(read.tensors[GATE.format(2)], tensors["transformer.h.2.attn.gating_factor"])


@pytest.mark.parametrize("shape", [(1, 1, HEADS, 1), (1, HEADS, 1, 1)])
def test_litgpts_gates_are_read_in_both_of_its_shapes(tiny_config: Make, tmp_path, shape):
    tensors = lit_v1(gate_shape=shape)
    torch.save({"model": tensors}, tmp_path / "lit_model.pth.adapter")
    read = read_foreign(tmp_path, tiny_config())
    assert read.format == "litgpt"
    assert torch.equal(read.tensors[GATE.format(3)], tensors["transformer.h.3.attn.gating_factor"].flatten())
    assert "another function" in read.notices[0]


def test_litgpts_older_groups_of_q_k_and_v_are_taken_apart(tiny_config: Make, tmp_path):
    """Group by group: its query heads, its key head, its value head (litgpt before fabf765b)."""
    modules = {"attn.attn": 80, "attn.proj": 32, "mlp.fc_1": 48, "mlp.fc_2": 48, "mlp.proj": 32}
    tensors = lit_v2(modules, ("norm_1.weight", "norm_2.weight"), "transformer.ln_f.weight")
    torch.save({"model": tensors}, tmp_path / "lit_model.pth.adapter_v2")
    read = read_foreign(tmp_path, tiny_config())  # 4 query and 2 key/value heads, 10 wide
    assert read.notices == ()  # that litgpt computes what is computed here
    fused = tensors["transformer.h.1.attn.attn.adapter_bias"]
    expected = {"q_proj": [0, 1, 4, 5], "k_proj": [2, 6], "v_proj": [3, 7]}
    for projection, heads in expected.items():
        rows = torch.cat([fused[10 * head : 10 * head + 10] for head in heads])
        assert torch.equal(read.tensors[f"model.layers.1.self_attn.{projection}.adapter_bias"], rows)


def test_a_vocabulary_that_lit_programs_padded_is_cut_to_the_bases(tiny_config: Make, tmp_path):
    modules = {"attn.qkv": 80, "attn.proj": 32, "mlp.fc_1": 48, "mlp.fc_2": 48, "mlp.proj": 32}
    tensors = lit_v2(modules, ("norm_1.weight", "norm_2.weight"), "transformer.ln_f.weight")
    tensors |= {"lm_head.adapter_scale": random(64), "lm_head.adapter_bias": random(64)}
    torch.save({"model": tensors}, tmp_path / "lit_model.pth.adapter_v2")
    read = read_foreign(tmp_path, tiny_config())
    assert torch.equal(read.tensors["lm_head.adapter_scale"], random(64)[:VOCABULARY])
    with pytest.raises(
        CheckpointError, match="64 entries, this base's vocabulary has 100; it was trained on"
    ):
        read_foreign(tmp_path, tiny_config(vocab_size=100))


def test_the_base_that_litgpt_notes_beside_its_file_is_told(tmp_path):
    torch.save({"model": lit_v1()}, tmp_path / "lit_model.pth.adapter")
    assert named_base(tmp_path) is None
    (tmp_path / "model_config.yaml").write_text(
        "bias: false\nhf_config:\n  name: open_llama_3b\n  org: openlm-research\nname: open_llama_3b\n"
    )
    assert named_base(tmp_path) == "openlm-research/open_llama_3b"


@pytest.mark.parametrize(
    ("num_rows", "trained", "length", "first", "is_guess"),
    [
        (15, range(1, 4), 5, 1, False),  # gates that stayed 0 tell which layers have no prompt
        (40, range(4), 10, 0, False),
        (20, range(0), 10, 2, True),  # untrained: the released length
        (20, range(4), 10, 2, True),  # every gate has moved: as its example.py reads it
        (30, range(2, 4), 15, 2, False),
    ],
)
def test_rows_of_prompts_are_shared_among_the_originals_last_layers(
    tiny_config: Make, tmp_path, num_rows, trained, length, first, is_guess
):
    tensors = original_v1(num_rows, trained)
    torch.save(tensors, tmp_path / "adapter.pth")
    read = read_foreign(tmp_path, tiny_config(**MHA))
    assert (read.settings.prompt_length, read.settings.start_layer) == (length, first)
    assert (read.settings.gate_activation, read.settings.version) == ("tanh", "v1")
    block = tensors["adapter_query.weight"][length : 2 * length]
    assert torch.equal(read.tensors[PROMPT.format(first + 1)], block)
    assert torch.equal(read.tensors[GATE.format(3)], tensors["layers.3.attention.gate"].flatten())
    assert any("the file does not say" in notice for notice in read.notices) == is_guess


def test_rows_that_nothing_shares_out_are_refused_and_a_checkpoints_arguments_share_them(
    tiny_config: Make, tmp_path
):
    tensors = original_v1(16, range(4))
    torch.save(tensors, tmp_path / "adapter.pth")
    with pytest.raises(CheckpointError, match="16 prompt rows are shared among 4 layers; name the training"):
        read_foreign(tmp_path / "adapter.pth", tiny_config(**MHA))
    base = {
        "tok_embeddings.weight": random(VOCABULARY, WIDTH),
        "layers.0.attention.wq.weight": random(WIDTH, WIDTH),
        "layers.0.attention_norm.weight": random(WIDTH),
        "norm.weight": random(WIDTH),
        "rope.freqs": random(4),
    }
    arguments = argparse.Namespace(adapter_len=8, adapter_layer=2, lr=1e-3)
    whole = {"model": tensors | base, "args": arguments, "epoch": 4, "optimizer": {"state": {}}}
    torch.save(whole, tmp_path / "checkpoint-4.pth")
    read = read_foreign(tmp_path / "checkpoint-4.pth", tiny_config(**MHA))
    assert (read.settings.version, read.settings.prompt_length) == ("v1", 8)
    assert read.settings.start_layer == 2


@pytest.mark.parametrize("value", [1.0, 0.7])
def test_the_originals_new_gate_multiplies(tiny_config: Make, tmp_path, value):
    tensors = original_v1(20, range(2, 4), "llama.")
    for layer in range(LAYERS):
        tensors[f"llama.layers.{layer}.attention.new_gate"] = torch.full((1, 1, 1, 1), value)
    torch.save({"model": tensors, "config": {"w_bias": False}}, tmp_path / "BIAS-7B.pth")
    read = read_foreign(tmp_path, tiny_config(**MHA))
    raw = tensors["llama.layers.3.attention.gate"].flatten()
    expected, activation = (raw, "tanh") if value == 1 else (value * raw.tanh(), "none")
    assert read.settings.gate_activation == activation
    assert torch.equal(read.tensors[GATE.format(3)], expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("clip_proj.weight", "adds an image's features to every prompt"),
        ("visual_query.weight", "adds an image's features to every prompt"),
        ("llama.layers.0.attention.lora_wq_l1.weight", "LoRA too"),
        ("layers.0.attention.wq_scale", "scales the inputs of linear layers"),
        ("layers.0.feed_forward.w1_bias", "scales the inputs of linear layers"),
        ("llama.layers.0.attention.wk.bias", "is no tensor of a LLaMA-Adapter"),
    ],
)
def test_what_the_original_has_and_no_adapter_here_can_hold_is_refused(
    tiny_config: Make, tmp_path, name, reason
):
    torch.save(original_v1(20, range(2, 4)) | {name: random(WIDTH)}, tmp_path / "a.pth")
    assert recognise(tmp_path) == "llama-adapter"
    assert_refused(tmp_path, tiny_config(**MHA), reason)


class Curse:
    """What is unpickled as a call of ``os.mkdir``."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_is_not_run(tiny_config: Make, tmp_path, is_zip):
    document = {"model": lit_v1(), "args": Curse(tmp_path / "ran")}
    torch.save(document, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    assert_refused(tmp_path, tiny_config(), "only code in the file could make, and that is never run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.bin"])
@pytest.mark.parametrize("kept", [0, 10, 300, 700])
def test_a_damaged_file_is_refused(tiny_config: Make, tmp_path, name, kept):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(lit_v1(), path)
    else:
        torch.save(lit_v1(), path)
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(path, tiny_config(), "copy it again")


def test_text_in_place_of_a_pickle_is_refused(tiny_config: Make, tmp_path):
    (tmp_path / "a.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert_refused(tmp_path, tiny_config(), "not a file that torch.save wrote")


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ([1, 2], "holds a list without tensors"),
        ({"epoch": 3}, "holds a dict without tensors"),
        ({"model": {"epoch": 3}}, "holds a dict without tensors"),
        ({"model.embed_tokens.weight": torch.ones(2)}, "found 1 tensors .model.embed_tokens.weight"),
    ],
)
def test_a_file_without_an_adapter_is_refused(tiny_config: Make, tmp_path, document, reason):
    torch.save(document, tmp_path / "a.pt")
    assert_refused(tmp_path, tiny_config(), reason)


def test_a_folder_must_leave_no_choice(tiny_config: Make, tmp_path):
    assert_refused(tmp_path / "nowhere", tiny_config(), "no such file or folder")
    assert_refused(tmp_path, tiny_config(), "exactly one adapter file .* found none")
    torch.save({"model": lit_v1()}, tmp_path / "lit_model.pth.adapter")
    torch.save({}, tmp_path / "lit_model.pth")
    assert recognise(tmp_path) == "litgpt"  # beside its base, as litgpt has them
    torch.save({"model": lit_v1()}, tmp_path / "lit_model.pth.adapter_v2")
    assert_refused(tmp_path, tiny_config(), "found lit_model.pth.adapter, lit_model.pth.adapter_v2; name")


def test_a_peft_folder_of_another_kind_is_refused(tiny_config: Make, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file(
        {"base_model.model.model.layers.0.lora_A.weight": random(4)}, tmp_path / "adapter_model.safetensors"
    )
    assert_refused(tmp_path, tiny_config(), "peft_type is 'LORA'; only ADAPTION_PROMPT")


def peft_tensors() -> dict[str, torch.Tensor]:
    prefix = "base_model.model.model.layers.3.self_attn"
    return {f"{prefix}.adaption_prompt": random(1, 3, WIDTH), f"{prefix}.adaption_gate": random(1)}


def test_peft_on_a_base_with_a_bias_in_o_proj_is_refused(tiny_config: Make, tmp_path):
    """T19: it adds that bias twice."""
    torch.save(peft_tensors(), tmp_path / "adapter_model.bin")
    assert read_foreign(tmp_path, tiny_config()).settings.top_layers == 1
    assert_refused(tmp_path, tiny_config(attention_bias=True), "PEFT adds twice")


@pytest.mark.parametrize(
    ("change", "overrides", "reason"),
    [
        ({}, {"num_hidden_layers": 6}, "its last adapted layer is 3, this base's last layer is 5"),
        ({}, {"num_hidden_layers": 2}, "its last adapted layer is 3, this base's last layer is 1"),
        ({}, {"hidden_size": 64}, "prompt has shape .3, 32., this base needs .3, 64."),
        ({}, {"num_attention_heads": 8}, "gate has shape .4., this base needs .8."),
        ({"transformer.h.2.attn.gating_factor": None}, {}, "has no .*layers.2.*gate, unlike"),
        ({"transformer.h.2.attn.adapter_wte.weight": None}, {}, "has .*layers.2.*gate, unlike"),
        ({"transformer.h.3.attn.adapter_wte.weight": None}, {}, "has no .*layers.3.*prompt, unlike"),
        ({"transformer.h.3.rms_1.scale": random(WIDTH)}, {}, "has .*input_layernorm.weight, unlike"),
        (
            {"transformer.wte.weight": random(4)},
            {},
            "transformer.wte.weight is no tensor of a lit-llama adapter",
        ),
    ],
)
def test_an_adapter_of_another_base_or_half_of_one_is_refused(
    tiny_config: Make, tmp_path, change, overrides, reason
):
    tensors = lit_v1() | change
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "a.pth")
    assert_refused(tmp_path, tiny_config(**MHA | overrides), reason)


def test_lit_llamas_v2_on_grouped_heads_is_refused(tiny_config: Make, tmp_path):
    modules = {"attn.c_attn": 96, "attn.c_proj": 32, "mlp.c_fc1": 48, "mlp.c_fc2": 48, "mlp.c_proj": 32}
    tensors = lit_v2(modules, ("rms_1.scale", "rms_2.scale"), "transformer.ln_f.scale")
    torch.save(tensors, tmp_path / "a.pth")
    assert read_foreign(tmp_path, tiny_config(**MHA)).settings.version == "v2"
    grouped = tiny_config(num_key_value_heads=2, head_dim=8)
    assert_refused(tmp_path, grouped, "c_attn.adapter_scale has 96 entries, q, k and v of this base have 64")
    biased = tiny_config(**MHA, attention_bias=True)
    assert_refused(tmp_path, biased, "its linear layers have no biases of the base's, this base has some")


def assert_refused(path: Path, config: LlamaConfig, reason: str) -> None:
    """In one line, with the path first."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_foreign(path, config)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
