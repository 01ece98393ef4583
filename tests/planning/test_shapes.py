"""The table of known bases against what each is published with: its number of parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from sparse_llama.config.settings import ModelSettings
from sparse_llama.errors import ModelError
from sparse_llama.planning import shapes
from sparse_llama.planning.shapes import KNOWN_BASES, find_base, head_widths, linear_outputs

PUBLISHED = {  # of the safetensors on the hub, or of the papers' tables
    "openlm-research/open_llama_3b": 3_426_473_600,
    "openlm-research/open_llama_7b": 6_738_415_616,
    "openlm-research/open_llama_13b": 13_015_864_320,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_base_has_the_parameters_it_is_published_with(name: str):
    found = find_base(ModelSettings(path=name))
    with torch.device("meta"):
        model = LlamaForCausalLM(found.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert found.notice is not None
    assert "table" in found.notice


@pytest.mark.parametrize("name", ["openlm-research/open_llama_3b", "meta-llama/Llama-3.1-8B"])
def test_widths_are_those_of_the_modules(name: str):
    config = find_base(ModelSettings(path=name)).config
    with torch.device("meta"):
        layer: Any = LlamaForCausalLM(config).model.layers[0]
    modules = dict(layer.named_modules())
    for linear, width in linear_outputs(config).items():
        (module,) = (one for path, one in modules.items() if path.endswith(linear))
        assert module.out_features == width
    assert head_widths(config) == (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features)


def test_a_folder_or_a_bundled_model_is_read_and_needs_no_note(tmp_path: Path):
    bundled = find_base(ModelSettings(path="bundled:tiny-llama"))
    assert bundled.notice is None
    (tmp_path / "config.json").write_text(json.dumps(bundled.config.to_dict()))
    assert find_base(ModelSettings(path=str(tmp_path))).config.hidden_size == bundled.config.hidden_size


def test_the_cache_comes_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = find_base(ModelSettings(path="bundled:tiny-llama")).config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    monkeypatch.setattr(shapes, "_cached", lambda name, revision: tmp_path / "config.json")
    found = find_base(ModelSettings(path=next(iter(KNOWN_BASES))))
    assert (found.config.hidden_size, found.notice) == (config.hidden_size, None)


def test_a_base_that_is_nowhere_is_one_line():
    """The tests run offline."""
    with pytest.raises(ModelError) as refused:
        find_base(ModelSettings(path="nobody/nothing"))
    assert "nobody/nothing: its config.json is not on this machine" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match="no such folder"):
        find_base(ModelSettings(path="./nowhere"))
