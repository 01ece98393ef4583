"""Folders exchanged with PEFT itself: it opens ours, we open what it trained, and the logits are the same."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted_models import shake, tokens, trainable_state
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import attach_adapters
from sparse_llama.adapters.interop import read_foreign, recognise, write_foreign
from sparse_llama.adapters.weights import apply_adapter
from sparse_llama.config.settings import AdapterSettings

ROUNDING = 1e-5  # relative; fp32, PEFT multiplies by o_proj twice and adds, we add and multiply once
BASES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4, "head_dim": 8},
    "gqa": {"num_key_value_heads": 2, "head_dim": 8},
    "tied": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("activation", ["none", "tanh"])
def test_peft_opens_our_folder_and_gives_our_logits(tiny_llama, tmp_path, base: str, activation: str):
    model: LlamaForCausalLM = tiny_llama(**BASES[base])
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(_written(model, tmp_path, activation)))
    assert error(logits(opened.eval()), logits(model)) < ROUNDING
    assert error(logits(model), logits(tiny_llama(**BASES[base]))) > 0.01


@pytest.mark.parametrize("base", BASES)
def test_a_folder_that_peft_trained_gives_its_logits_here(tiny_llama, tmp_path, base: str):
    config = peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=3, task_type="CAUSAL_LM")
    theirs: Any = peft.get_peft_model(tiny_llama(**BASES[base]), config)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.3)
    for _ in range(3):
        theirs(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    theirs.base_model.model.name_or_path = ""
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs.eval())

    model: LlamaForCausalLM = tiny_llama(**BASES[base])
    assert recognise(tmp_path) == "peft"
    read = read_foreign(tmp_path, model.config)
    assert read.settings == AdapterSettings(version="v1", prompt_length=5, top_layers=3, gate="scalar")
    untouched = logits(model)
    attach_adapters(model, read.settings)
    apply_adapter(model, read.tensors)
    assert error(logits(model), expected) < ROUNDING
    assert error(untouched, expected) > 1e-3


def test_the_base_that_peft_notes_is_told(tiny_llama, tmp_path):
    model = tiny_llama(**BASES["mha"])
    folder = _written(model, tmp_path, "none")
    assert peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path == "someone/a-llama"
    assert read_foreign(folder, model.config).base_model == "someone/a-llama"


def _written(model: LlamaForCausalLM, folder: Path, activation: str) -> Path:
    """Adapt ``model``, and write that for PEFT."""
    settings = AdapterSettings.parse(
        {"version": "v1", "prompt_length": 3, "gate": "scalar", "gate_activation": activation}
    )
    attach_adapters(model, settings)
    tensors = trainable_state(shake(model))
    write_foreign("peft", folder, settings, tensors, model.config, base_model="someone/a-llama")
    return folder
