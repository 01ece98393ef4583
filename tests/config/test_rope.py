"""``rope_parameters`` are transformers' own, key by key, and what transformers only warns of ends the run."""

import logging
from typing import Any

import pytest
from transformers import LlamaConfig

from sparse_llama.config.rope import FixedRopeParameters, RopeParameters
from sparse_llama.config.settings import Settings
from sparse_llama.errors import ConfigError

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WHOLE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.1,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn by mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    "llama3": LLAMA_3 | {"rope_theta": 5e5, "original_max_position_embeddings": 32},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({"factor": 2}, ".rope_type: missing; this key is required"),
    "transformers' old name": ({"type": "linear", "factor": 2}, ".type: unknown key; allowed: rope_type, "),
    "a type that is none": (
        {"rope_type": "yarm", "factor": 2},
        ".rope_type: must be 'default', 'linear', 'dynamic', 'yarn' or 'llama3', got \"yarm\"; did you mean "
        "'yarn'?",
    ),
    "a type for other models": ({"rope_type": "longrope"}, ".rope_type: must be 'default', 'linear', "),
    "a misspelt key": (
        {"rope_type": "yarn", "factor": 2, "beta_fats": 32},
        ".beta_fats: unknown key; did you mean 'beta_fast'?",
    ),
    "another type's key": (
        {"rope_type": "linear", "factor": 2, "beta_fast": 32},
        ": beta_fast is a key of rope_type yarn, this is linear; keys of linear: rope_theta, factor",
    ),
    "a key of two others": (
        {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 64},
        ": original_max_position_embeddings is a key of rope_type yarn or llama3, this is dynamic; keys of "
        "dynamic: rope_theta, factor",
    ),
    "a factor of default": (
        {"rope_type": "default", "factor": 2},
        ": factor is a key of rope_type linear or dynamic or yarn or llama3, this is default; keys of "
        "default: rope_theta",
    ),
    "no factor": ({"rope_type": "yarn"}, ': rope_type yarn needs factor, a number >= 1 or "auto"'),
    "half of llama3": (
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1},
        ": rope_type llama3 needs high_freq_factor, a number",
    ),
    "a factor that shrinks": (
        {"rope_type": "linear", "factor": 0.5},
        '.factor: must be a number >= 1 or "auto", got 0.5',
    ),
    "a factor in quotes": (
        {"rope_type": "linear", "factor": "4"},
        '.factor: must be a number >= 1 or "auto", got "4"',
    ),
    "a theta of zero": ({"rope_type": "default", "rope_theta": 0}, ".rope_theta: must be > 0"),
    "betas the wrong way round": (
        {"rope_type": "yarn", "factor": 2, "beta_fast": 0.5},
        ": beta_fast must be above beta_slow, got 0.5 and 1",
    ),
    "waves the wrong way round": (
        LLAMA_3 | {"low_freq_factor": 4, "high_freq_factor": 4},
        ": high_freq_factor must be above low_freq_factor, got 4 and 4",
    ),
    "one mscale": (
        {"rope_type": "yarn", "factor": 2, "mscale": 1},
        ": mscale and mscale_all_dim act together; give both or neither",
    ),
    "mscale and what it would give": (
        {"rope_type": "yarn", "factor": 2, "mscale": 1, "mscale_all_dim": 1, "attention_factor": 1},
        ": mscale has no effect beside attention_factor; keep one of them",
    ),
}


@pytest.mark.parametrize(("block", "line"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_one_line(block: dict[str, Any], line: str):
    with pytest.raises(ConfigError) as refused:
        Settings.parse({"model": {"rope_parameters": block}}, "sparse_llama")
    assert str(refused.value).startswith(f"sparse_llama.model.rope_parameters{line}")


@pytest.mark.parametrize("block", WHOLE.values(), ids=WHOLE)
def test_transformers_takes_each_type_without_a_word(block: dict[str, Any], caplog: pytest.LogCaptureFixture):
    """What is written here goes into ``config.json`` as it is: no key of ours, no null, no warning there."""
    written = RopeParameters.parse(block).to_transformers()
    assert written == block
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        config = LlamaConfig(max_position_embeddings=256, rope_parameters=written)
    finally:
        library.removeHandler(caplog.handler)
    assert caplog.messages == []
    found: Any = config.rope_parameters
    assert {name: found[name] for name in block} == block


def test_a_document_and_its_run_say_the_same(load):
    block = {"rope_type": "yarn", "factor": "auto", "beta_fast": 16}
    run = load({"sparse_llama": {"model": {"rope_parameters": block}}})
    assert run.to_json()["sparse_llama"]["model"]["rope_parameters"] == block


def test_the_flag_asks_for_a_type_and_its_own_factor(load):
    yarn = {"rope_type": "yarn", "factor": 4, "beta_fast": 16}
    document = {"sparse_llama": {"model": {"rope_parameters": yarn}}}
    run = load(document, rope="linear")
    assert run.settings.model.rope_parameters == RopeParameters(rope_type="linear", factor="auto")
    assert load(document).settings.model.rope_parameters == RopeParameters.parse(yarn)


@pytest.mark.parametrize(
    ("block", "line"),
    [
        ({"rope_type": "linear", "factor": "auto"}, 'factor must be a number here, got "auto"'),
        ({"rope_type": "dynamic", "factor": 2}, 'rope_type "dynamic" turns by the length of a run'),
    ],
)
def test_what_an_adapter_was_trained_with_depends_on_no_run(block: dict[str, Any], line: str):
    with pytest.raises(ConfigError, match=line):
        FixedRopeParameters.parse(block, "rope_parameters")
