"""An adapter belongs to the positions that it was trained with: its folder says them, and a model that turns
otherwise is refused."""

import json
from typing import Any

import pytest
import torch
from adapted_models import adapt, tokens
from transformers import LlamaConfig

from sparse_llama.adapters import load_adapter, save_adapter
from sparse_llama.adapters.rotation import fixed_parameters, same_rotation, trained_positions, with_rotation
from sparse_llama.adapters.weights import read_adapter_folder
from sparse_llama.config.rope import FixedRopeParameters
from sparse_llama.errors import CheckpointError

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"rope_parameters": YARN, "max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}


@torch.no_grad()
def test_a_saved_adapter_names_its_positions_and_loads_where_they_are(tiny_llama, tmp_path):
    model = adapt(tiny_llama(**LONG), "v2")
    save_adapter(model, tmp_path, base_model="tiny")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rope_parameters"] == YARN
    other = tiny_llama(**LONG)
    load_adapter(other, tmp_path)
    assert torch.equal(other(input_ids=tokens(1, 200)).logits, model(input_ids=tokens(1, 200)).logits)


def test_a_model_that_turns_otherwise_is_refused_with_what_to_load_it_with(tiny_llama, tmp_path):
    save_adapter(adapt(tiny_llama(**LONG), "v2"), tmp_path, base_model="tiny")
    base = tiny_llama()
    before = set(dict(base.named_parameters()))
    with pytest.raises(CheckpointError) as refused:
        load_adapter(base, tmp_path)
    line = str(refused.value)
    assert "\n" not in line
    assert "was trained with positions by yarn, factor 4.0, rope_theta 10000.0, " in line
    arguments = line[line.index("rope_parameters={") :]
    assert eval(f"dict({arguments})") == LONG
    assert set(dict(base.named_parameters())) == before


@torch.no_grad()
def test_a_file_from_before_is_of_the_bases_own_positions(tiny_llama, tmp_path):
    """Old folders have no such key; they load as they did, whatever the base's positions are."""
    for name, overrides in (("plain", {}), ("long", LONG)):
        model = adapt(tiny_llama(**overrides), "v1")
        save_adapter(model, tmp_path / name, base_model="tiny")
        path = tmp_path / name / "adapter_config.json"
        document = json.loads(path.read_text())
        del document["rope_parameters"]
        path.write_text(json.dumps(document))
        file, _ = read_adapter_folder(tmp_path / name)
        assert file.rope_parameters is None
        other = tiny_llama(**overrides)
        load_adapter(other, tmp_path / name)
        assert torch.equal(other(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 'rope_type "dynamic" turns by the length of a run'),
        ({"rope_type": "linear", "factor": "auto"}, "factor must be a number here"),
        ({"rope_type": "linear"}, "rope_type linear needs factor"),
    ],
)
def test_a_damaged_entry_is_refused_in_one_line(tiny_llama, tmp_path, rope, reason):
    save_adapter(adapt(tiny_llama(), "v1"), tmp_path, base_model="tiny")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rope}))
    with pytest.raises(CheckpointError, match=reason) as refused:
        read_adapter_folder(tmp_path)
    assert "\n" not in str(refused.value)


def test_nothing_given_is_the_base_itself(tiny_config):
    base = tiny_config()
    assert with_rotation(base, None, 500) is base


@pytest.mark.parametrize("overrides", [{}, LONG, {"rope_parameters": LINEAR}])
def test_a_bases_own_settings_written_out_change_nothing(tiny_config, overrides):
    base = tiny_config(**overrides)
    rope = fixed_parameters(base)
    assert rope is not None
    again = with_rotation(base, rope, 64)
    assert same_rotation(base, again)
    assert again.max_position_embeddings == base.max_position_embeddings
    assert rope.to_transformers() == {
        name: value for name, value in (base.rope_parameters or {}).items() if value is not None
    }


def test_settings_that_no_run_can_make_are_left_to_the_base(tiny_config):
    for rope in ({"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "proportional", "rope_theta": 1e4}):
        assert fixed_parameters(tiny_config(rope_parameters=rope)) is None


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        (YARN, 64),
        (LINEAR, None),
    ],
)
def test_trained_positions_are_told_where_the_configuration_tells_them(rope, expected):
    longest = 256 if rope is YARN else 64
    base = LlamaConfig(max_position_embeddings=longest, rope_parameters=dict(rope))
    assert trained_positions(base) == expected


def test_the_same_turns_by_other_names_are_the_same(tiny_config):
    plain = tiny_config()
    by_one = tiny_config(rope_parameters={"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4})
    assert same_rotation(plain, by_one)
    louder = FixedRopeParameters.parse(YARN | {"factor": 1.0, "attention_factor": 1.2})
    assert not same_rotation(plain, with_rotation(plain, louder, 64))
    assert not same_rotation(plain, tiny_config(head_dim=8))
