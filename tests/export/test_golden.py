"""Other programs' own adapters, merged: the folder computes what those programs computed."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from exported_runs import open_export
from oracles.masked_attention import relative_error
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.export import export_merged

pytestmark = pytest.mark.real_data
ROUNDING = 1e-5  # two fp32 implementations that add in different orders
FP16_ROUNDING = 2.0**-11  # the original rounds tanh(gate) to fp16
LIMITS = {
    "lit_v1": ROUNDING,
    "lit_v2": ROUNDING,
    "peft_mha": ROUNDING,
    "peft_gqa": ROUNDING,
    "ogv_v1": FP16_ROUNDING,
    "ogv_mm7b_text": FP16_ROUNDING,
}


def write_base(golden: Path, name: str, folder: Path) -> None:
    is_gqa = name == "peft_gqa"
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2 if is_gqa else 4,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(golden / f"{'peft_gqa_' * is_gqa}base_hf.safetensors"))
    model.save_pretrained(folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["A few words, to have a tokenizer no larger than the base's 128 tokens."] * 9
        ),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=40,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


@pytest.mark.parametrize("name", LIMITS)
def test_a_merged_export_computes_what_the_adapters_own_program_does(shared, tmp_path, name):
    golden = shared / "golden" / "adapters"
    write_base(golden, name, tmp_path / "base")
    adapter = golden / (f"{name}_adapter" if name.startswith("peft") else f"{name}_adapter.safetensors")
    export_merged(adapter, tmp_path / "out", model=str(tmp_path / "base"), dtype=torch.float32)
    theirs = np.load(golden / f"{name}.npz")
    with torch.no_grad():
        logits = open_export(tmp_path / "out")(input_ids=torch.from_numpy(theirs["input_ids"])).logits
    assert relative_error(logits, torch.from_numpy(theirs["logits"])) < LIMITS[name]
