"""A run beyond its base's range computes what transformers computes with the same ``rope_parameters``, or
does not begin."""

import json
from typing import Any

import pytest
import torch
from adapted_models import tokens
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.config.layers import LayerSparsities
from sparse_llama.config.settings import Settings
from sparse_llama.errors import ConfigError
from sparse_llama.model.assemble import assemble
from sparse_llama.model.rope import Positions, run_positions

RANGE, LENGTH = 64, 200  # what the tiny base was made for, and a run beyond it
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": "auto"},
    "yarn": {"rope_type": "yarn", "factor": "auto"},
    "yarn, every key": {
        "rope_type": "yarn",
        "factor": 8,
        "rope_theta": 2e4,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.3,
        "beta_fast": 12,
        "beta_slow": 2,
        "truncate": False,
    },
    "llama3": LLAMA_3 | {"factor": "auto"},
}


def settings(rope: dict[str, Any] | None = None, seq_length: int = LENGTH, **model: Any) -> Settings:
    block = {"seq_length": seq_length, "model": model | ({} if rope is None else {"rope_parameters": rope})}
    return Settings.parse(block, "sparse_llama")


def positions(base: LlamaConfig, rope: dict[str, Any] | None, seq_length: int = LENGTH) -> Positions:
    return run_positions(base, settings(rope, seq_length))


def own(found: Positions) -> dict[str, Any]:
    assert found.rope_parameters is not None
    return found.rope_parameters.to_transformers()


def refusal(base: LlamaConfig, rope: dict[str, Any] | None, seq_length: int = LENGTH) -> str:
    with pytest.raises(ConfigError) as refused:
        positions(base, rope, seq_length)
    line = str(refused.value)
    assert "\n" not in line
    return line


@pytest.fixture
def assembled(tiny_llama, tmp_path):
    """Return a function that makes the tiny base, as a run of ``rope`` does, and returns it with its
    folder."""

    def make(rope: dict[str, Any], *, dtype: torch.dtype = torch.float32, **overrides: Any):
        tiny_llama(**overrides).save_pretrained(tmp_path)
        made = assemble(settings(rope, path=str(tmp_path)), LayerSparsities(None), dtype=dtype)
        return made.model.eval(), tmp_path

    return make


def transformers_own(folder, rope: dict[str, Any], longest: int) -> LlamaForCausalLM:
    """Return the base opened with plain transformers and other rotary settings."""
    config = LlamaConfig.from_pretrained(folder)
    config.rope_parameters, config.max_position_embeddings = dict(rope), longest  # type: ignore[assignment]
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, config=config)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("rope", TYPES.values(), ids=TYPES)
def test_an_assembled_model_has_transformers_own_logits_beyond_the_range(assembled, rope):
    """To the bit, because an untrained adapter changes nothing; and other than the base's without
    ``rope``."""
    model, folder = assembled(rope)
    written = {"factor": LENGTH / RANGE, "rope_theta": 1e4} if rope["rope_type"] != "default" else {}
    if rope["rope_type"] in ("yarn", "llama3"):
        written["original_max_position_embeddings"] = RANGE
    whole = written | {name: value for name, value in rope.items() if value != "auto"}
    theirs = transformers_own(folder, whole, LENGTH)
    ids = tokens(2, LENGTH)
    ours = model(input_ids=ids).logits
    assert torch.allclose(ours, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    assert model.model.rotary_emb.attention_scaling == theirs.model.rotary_emb.attention_scaling
    plain = LlamaForCausalLM.from_pretrained(folder).eval()
    assert not torch.allclose(ours, plain(input_ids=ids).logits, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_dynamic_is_what_transformers_computes_at_the_runs_length_and_stays_so(assembled):
    """transformers' own module turns short sequences otherwise after a long one than before it."""
    rope = {"rope_type": "dynamic", "factor": "auto"}
    model, folder = assembled(rope)
    theirs = transformers_own(folder, {"rope_type": "dynamic", "factor": 3.125, "rope_theta": 1e4}, RANGE)
    long, short = tokens(1, LENGTH), tokens(1, 90)
    fresh = theirs(input_ids=short).logits
    error = (model(input_ids=long).logits - theirs(input_ids=long).logits).abs().max()
    assert error < 1e-4  # theirs raises the base to a power in fp32, ours in fp64
    stale = theirs(input_ids=short).logits
    assert (stale - fresh).abs().max() > 1e-2
    ours = model(input_ids=short).logits
    assert (ours - stale).abs().max() < 1e-4
    model(input_ids=tokens(1, 20))  # there the module would go back to the base's turns
    assert torch.equal(model(input_ids=short).logits, ours)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_document_in_a_packed_row_is_turned_as_alone(assembled, kind):
    """Under transformers' dynamic type the longest document of a row would turn the others too."""
    model, _ = assembled({"rope_type": kind, "factor": "auto"})
    ids, lengths = tokens(1, 170), [130, 40]
    where = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(input_ids=ids, position_ids=where, use_cache=False).logits
    parts = [model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    assert torch.allclose(packed, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_frequencies_stay_fp32_in_a_bf16_model(assembled, kind):
    rope = {"rope_type": kind, "factor": "auto"}
    exact, rounded = (
        assembled(rope, dtype=dtype)[0].model.rotary_emb for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.inv_freq.dtype == torch.float32
    assert torch.equal(exact.inv_freq, rounded.inv_freq)


def test_auto_is_the_length_by_the_trained_positions_and_theta_is_the_bases(tiny_config):
    base = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    found = positions(base, {"rope_type": "linear", "factor": "auto"}, 96)
    assert own(found) == {"rope_type": "linear", "factor": 1.5, "rope_theta": 5e5}
    assert found.config.max_position_embeddings == 96
    assert base.max_position_embeddings == RANGE  # the base's own is left as it was
    assert found.notices == ()


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "linear", "factor": 4}, 256),
        ({"rope_type": "yarn", "factor": 4}, 256),
        ({"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 32}, 512),
        ({"rope_type": "dynamic", "factor": 4}, LENGTH),
        ({"rope_type": "default", "rope_theta": 1e6}, LENGTH),
        (LLAMA_3 | {"factor": 4}, LENGTH),
    ],
)
def test_the_models_range_becomes_what_its_positions_reach(tiny_config, rope, longest):
    """What generation and evaluation may read, and what an export's ``config.json`` says."""
    assert positions(tiny_config(), rope).config.max_position_embeddings == longest


def test_a_dynamic_run_says_what_it_computes_with(tiny_config):
    """NTK-aware scaling: theta (s N / M - (s - 1))^(D / (D - 2)); D is 10 here."""
    found = positions(tiny_config(), {"rope_type": "dynamic", "factor": 2}, 192)
    assert own(found) == {"rope_type": "default", "rope_theta": pytest.approx(1e4 * 5 ** (10 / 8))}


def test_a_longer_run_than_the_base_was_made_for_is_refused_with_what_to_write(tiny_config):
    line = refusal(tiny_config(), None)
    assert line.startswith(
        "sparse_llama.seq_length: 200 tokens, but bundled:tiny-llama was made for 64 positions "
        "(max_position_embeddings); use at most 64, or stretch them with --rope yarn"
    )
    written = json.loads("{" + line[line.index('"sparse_llama"') :] + "}")
    block = {"seq_length": LENGTH} | written["sparse_llama"]
    assert run_positions(tiny_config(), Settings.parse(block)).config.max_position_embeddings == LENGTH


def test_a_run_of_the_bases_own_length_needs_nothing(tiny_config):
    base = tiny_config()
    assert positions(base, None, RANGE) == Positions(base, None)


def test_random_weights_know_no_positions(tiny_config):
    found = run_positions(tiny_config(), settings(random_weights=True))
    assert (found.rope_parameters, found.config.max_position_embeddings) == (None, LENGTH)
    assert found.config.rope_parameters == tiny_config().rope_parameters


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_auto_within_the_range_leaves_the_base_alone_and_says_so(tiny_config, kind):
    """A long configuration, tried with a short ``--seq_length``."""
    base = tiny_config()
    found = positions(base, {"rope_type": kind, "factor": "auto"}, RANGE)
    assert (found.config, found.rope_parameters) == (base, None)
    assert found.notices == (
        'sparse_llama.model.rope_parameters: factor "auto" changes nothing up to 64 tokens, which the base '
        "was made for",
    )


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "factor": 1}, {"rope_type": "dynamic", "factor": 4}]
)
def test_what_changes_nothing_is_said(tiny_config, rope):
    found = positions(tiny_config(), rope, 32)
    assert found.rope_parameters is None
    assert found.notices == (
        "sparse_llama.model.rope_parameters: turns positions as the base does; no effect",
    )


def test_the_bases_own_turns_may_be_asked_for_beyond_its_range(tiny_config):
    """A baseline: what stretching is worth."""
    found = positions(tiny_config(), {"rope_type": "default"})
    assert found.config.max_position_embeddings == LENGTH
    assert own(found) == {"rope_type": "default", "rope_theta": 1e4}
    assert found.notices[0].endswith("by its config.json the base has seen no position beyond 64")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_factor_that_does_not_reach_is_refused(tiny_config, kind):
    line = refusal(tiny_config(), {"rope_type": kind, "factor": 2})
    assert line == (
        "sparse_llama.model.rope_parameters.factor: 2 times the 64 positions that the base was trained on "
        'are 128, fewer than seq_length, 200; use at least 3.13, or "auto"'
    )
    assert own(positions(tiny_config(), {"rope_type": kind, "factor": 3.13}))["factor"] == 3.13


def test_positions_that_the_document_counts_higher_need_no_stretching(tiny_config):
    """``auto`` never goes below 1: transformers would take it and only warn."""
    rope = {"rope_type": "yarn", "factor": "auto", "original_max_position_embeddings": 512}
    found = positions(tiny_config(), rope)
    assert own(found)["factor"] == 1.0
    assert found.config.max_position_embeddings == 512


LLAMA_31 = LLAMA_3 | {"factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 32}


def test_a_base_that_is_stretched_already_counts_from_its_original_positions(tiny_config):
    """Llama 3.1's range is 16 times what it was trained on first: ``auto`` on the range would undo that."""
    base = tiny_config(rope_parameters=LLAMA_31, max_position_embeddings=512)
    assert positions(base, None, 512) == Positions(base, None)
    found = positions(base, {"rope_type": "yarn", "factor": "auto"}, 1024)
    assert own(found) == {
        "rope_type": "yarn",
        "factor": 32.0,
        "rope_theta": 5e5,
        "original_max_position_embeddings": 32,
    }
    assert found.config.max_position_embeddings == 1024
    assert found.notices[0].startswith("sparse_llama.model.rope_parameters: replaces the base's own (")


def test_llama_3s_waves_may_be_stretched_less_than_the_length_and_that_is_said(tiny_config):
    """Llama 3.1's own numbers: 8 x 8,192 for 131,072 tokens."""
    found = positions(tiny_config(), LLAMA_3 | {"factor": 2})
    assert any("are stretched to 128 positions, seq_length is 200" in notice for notice in found.notices)
    assert positions(tiny_config(), LLAMA_3 | {"factor": 4}).notices == ()


@pytest.mark.parametrize(
    ("rope", "todo"),
    [
        ({"rope_type": "linear", "factor": "auto"}, "give factor as a number"),
        ({"rope_type": "yarn", "factor": "auto"}, "give original_max_position_embeddings"),
        ({"rope_type": "yarn", "factor": 9}, "give original_max_position_embeddings"),
        ({"rope_type": "dynamic", "factor": 9}, "use linear or yarn"),
    ],
)
def test_a_linear_base_does_not_say_how_long_it_was_trained_first(tiny_config, rope, todo):
    """vicuna-7b-v1.5-16k counts ``max_position_embeddings`` before its factor, LLaMA-2-7B-32K after it."""
    base = tiny_config(rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4})
    line = refusal(base, rope)
    assert "stretched already (linear, factor 8.0), and its configuration does not say from how many" in line
    assert todo in line
    explicit = {"rope_type": "linear", "factor": 32}
    assert own(positions(base, explicit))["factor"] == 32.0
