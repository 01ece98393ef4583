"""The code that an export carries: caches, padding, lengths, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from exported_runs import LAYOUT, MASTER_LENGTH, ids, open_export
from oracles.masked_attention import relative_error
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from sparse_llama.export import export_merged

MODES = {
    "dense": None,
    "fixed, two patterns": LAYOUT,
    "bslongformer": {"mode": "bslongformer", "block": 4, "num_sliding_window_blocks": 3},
    "bigbird, a pattern per head": {
        "mode": "bigbird",
        "block": 4,
        "num_random_blocks": 1,
        "different_layout_per_head": True,
    },
    "variable": {"mode": "variable", "block": 4, "local_window_blocks": [1, 3], "num_random_blocks": 1},
    "window, block 1": {"mode": "local_sliding_window", "block": 1, "num_sliding_window_blocks": 9},
    "window, large blocks": {"mode": "local_sliding_window", "block": 16, "num_sliding_window_blocks": 3},
    "bslongformer, some layers dense": {
        "mode": "bslongformer",
        "block": 4,
        "num_sliding_window_blocks": 3,
    },
}
DENSE_LAYERS = {"bslongformer, some layers dense": (0, -1)}
CACHED = pytest.mark.parametrize("mode", ["dense", "fixed, two patterns", *DENSE_LAYERS])


@pytest.fixture
def export(trained_run, tmp_path):
    """Return a function that exports a run with a layout; it returns the export and the adapted model."""

    def make(mode: str, version: str = "v2"):
        run = trained_run(version, layout=MODES[mode], dense_layers=DENSE_LAYERS.get(mode))
        export_merged(run.folder, tmp_path / "out")
        return open_export(tmp_path / "out"), run.model

    return make


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_prefill_and_decoding_compute_what_the_adapted_model_does_in_one_pass(export, mode):
    exported, adapted = export(mode)
    batch = ids(MASTER_LENGTH)
    expected = adapted(input_ids=batch, use_cache=False).logits
    assert relative_error(exported(input_ids=batch).logits, expected) < 1e-5
    cache = DynamicCache(config=exported.config)
    parts = [
        exported(input_ids=part, past_key_values=cache, use_cache=True).logits
        for part in batch.split([5, 18, 1, 1, 7, 30, 1, 1], dim=1)  # within, at and across blocks
    ]
    assert relative_error(torch.cat(parts, 1), expected) < 1e-5


@torch.no_grad()
@CACHED
def test_a_static_cache_is_read_up_to_its_last_token(export, mode):
    exported, adapted = export(mode)
    cache = StaticCache(config=exported.config, max_cache_len=MASTER_LENGTH + 20)
    parts = [
        exported(input_ids=part, past_key_values=cache, use_cache=True).logits
        for part in ids(40).split([33, 1, 1, 5], dim=1)
    ]
    assert relative_error(torch.cat(parts, 1), adapted(input_ids=ids(40)).logits) < 1e-5


@torch.no_grad()
@CACHED
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_computed_as_if_it_were_alone(export, mode, side):
    exported, adapted = export(mode)
    lengths = (40, 17, 33)
    batch, mask = torch.zeros(3, 40, dtype=torch.int64), torch.zeros(3, 40, dtype=torch.int64)
    for row, length in enumerate(lengths):
        where = slice(40 - length, 40) if side == "left" else slice(0, length)
        batch[row, where], mask[row, where] = ids(length, 3)[row], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = exported(input_ids=batch, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        alone = adapted(input_ids=ids(length, 3)[row : row + 1]).logits[0]
        assert relative_error(logits[row][mask[row].bool()], alone) < 1e-5


@torch.no_grad()
@CACHED
def test_generation_from_prompts_padded_on_the_left_is_that_of_each_prompt_alone(export, mode):
    exported, adapted = export(mode)
    prompts = [ids(length)[:1] for length in (21, 9)]
    batch = torch.zeros(2, 21, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, 21 - prompt.shape[1] :], mask[row, 21 - prompt.shape[1] :] = prompt[0], 1
    greedy = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    answers = exported.generate(batch, attention_mask=mask, **greedy)[:, 21:]
    for prompt, answer in zip(prompts, answers, strict=True):
        sequence = prompt
        for _ in range(20):
            following = adapted(input_ids=sequence, use_cache=False).logits[:, -1].argmax(-1)
            sequence = torch.cat([sequence, following[:, None]], 1)
        assert torch.equal(answer, sequence[0, prompt.shape[1] :])


@torch.no_grad()
def test_a_sparse_prefill_gathers_only_the_keys_that_some_query_of_a_chunk_sees(export, monkeypatch):
    exported, _ = export("window, block 1")
    pairs: list[int] = []
    real = F.scaled_dot_product_attention

    def record(query, key, value, **arguments):
        pairs.append(query.shape[2] * key.shape[2])
        return real(query, key, value, **arguments)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", record)
    import sys

    code = sys.modules[type(exported).__module__]
    monkeypatch.setattr(code, "_CHUNK_TOKENS", 8)
    exported(input_ids=ids(MASTER_LENGTH))
    per_layer = sum(pairs) / exported.config.num_hidden_layers
    assert per_layer <= MASTER_LENGTH * (8 + 4)  # a chunk of 8 and the 4 tokens before it; S x S is 64 x 64
    assert max(pairs) <= 8 * 12


@torch.no_grad()
def test_a_sequence_as_long_as_the_layout_works_and_one_token_more_does_not(export):
    exported, _ = export("bslongformer")
    cache = DynamicCache(config=exported.config)
    exported(input_ids=ids(MASTER_LENGTH), past_key_values=cache, use_cache=True)
    message = r"sparse layout is made for 64 tokens, the sequence has 65"
    with pytest.raises(ValueError, match=message):
        exported(input_ids=ids(1), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=message):
        exported(input_ids=ids(MASTER_LENGTH + 1))


@torch.no_grad()
def test_a_dense_export_has_no_length_but_the_models(export):
    exported, adapted = export("dense")
    batch = ids(3 * MASTER_LENGTH)
    assert relative_error(exported(input_ids=batch).logits, adapted(input_ids=batch).logits) < 1e-5


def test_padding_inside_a_sequence_is_refused_by_a_sparse_export(export):
    exported, _ = export("bslongformer")
    mask = torch.ones(2, 10)
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="padding between the tokens of a row"):
        exported(input_ids=ids(10), attention_mask=mask)


def test_a_mask_of_pairs_is_refused_by_a_sparse_export(export):
    exported, _ = export("bslongformer")
    with pytest.raises(ValueError, match="a mask of pairs of tokens does not go with a sparse layout"):
        exported(input_ids=ids(10), attention_mask=torch.zeros(2, 1, 10, 10))


def test_packed_rows_are_refused_by_a_sparse_export(export):
    exported, _ = export("bslongformer")
    with pytest.raises(ValueError, match="do not count up by one"):
        exported(input_ids=ids(10), position_ids=torch.arange(10)[None] % 6)


@torch.no_grad()
def test_packed_rows_of_a_dense_export_are_documents_of_their_own(export):
    exported, adapted = export("dense")
    packed = exported(input_ids=ids(10), position_ids=torch.arange(10)[None] % 6, use_cache=False).logits
    assert relative_error(packed[:, :6], adapted(input_ids=ids(10)[:, :6]).logits) < 1e-5
    assert relative_error(packed[:, 6:], adapted(input_ids=ids(10)[:, 6:]).logits) < 1e-5


@CACHED
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_that_would_leave_out_the_prompts_is_refused(export, tmp_path, mode, implementation):
    exported, _ = export(mode)
    with pytest.raises(ValueError, match="its own attention"):
        exported.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=f"{implementation}.*its own attention|does not support"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", trust_remote_code=True, attn_implementation=implementation
        )


@torch.no_grad()
@CACHED
def test_saving_and_opening_again_keeps_every_bit(export, tmp_path, mode):
    exported, _ = export(mode)
    exported.save_pretrained(tmp_path / "again")
    again = open_export(tmp_path / "again")
    assert torch.equal(again(input_ids=ids()).logits, exported(input_ids=ids()).logits)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_without_a_loaded_layout_says_so(export):
    exported, _ = export("bslongformer")
    fresh = type(exported)(exported.config).eval()
    with pytest.raises(ValueError, match="from_pretrained"):
        fresh(input_ids=ids(10))
