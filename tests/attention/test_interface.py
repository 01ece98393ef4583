"""The seam to transformers: the same numbers where attention is full, documents apart, decoding as in
training."""

import copy
import itertools

import pytest
import torch
from oracles.masked_attention import relative_error, token_table
from transformers import DynamicCache

from sparse_llama.attention.decoding import DecodingCore
from sparse_llama.attention.documents import find_documents
from sparse_llama.attention.interface import attach_attention, plan_attention
from sparse_llama.config.sparsity import Sparsity, parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import build_layout

SPARSE = {
    "bslongformer": {"mode": "bslongformer", "block": 4, "num_sliding_window_blocks": 3},
    "fixed": {
        "mode": "fixed",
        "block": 4,
        "num_local_blocks": 2,
        "different_layout_per_head": True,
        "num_different_global_patterns": 2,
    },
    "bigbird": {
        "mode": "bigbird",
        "block": 4,
        "different_layout_per_head": True,
        "num_random_blocks": 1,
    },
}
LENGTH = 50


def attached(model, *layers: Sparsity | None, backend: str = "auto"):
    """Attach attention to ``model``: one sparsity for all layers, or one for each."""
    sparsities = layers if len(layers) > 1 else layers * model.config.num_hidden_layers
    plan = plan_attention(sparsities, num_heads=4, master_length=64, seed=0, backend=backend)  # type: ignore[arg-type]
    attach_attention(model, plan)
    return model


def ids(num_rows: int = 2, num_tokens: int = LENGTH) -> torch.Tensor:
    return torch.randint(61, (num_rows, num_tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layout", [None, {"mode": "dense"}, {"mode": "bslongformer", "num_sliding_window_blocks": 40}]
)
def test_full_attention_has_the_bits_of_transformers_own(tiny_llama, dtype, layout):
    """Whatever layout is causal at the sequence's length is full attention."""
    plain = tiny_llama().to(dtype)
    plain.set_attn_implementation("sdpa")
    if layout is not None and layout["mode"] == "bslongformer":
        layout = layout | {"block": 1}
    sparsity = None if layout is None else parse_sparsity(layout)
    ours = attached(copy.deepcopy(plain), sparsity)
    short = ids(num_tokens=20)
    expected, found = plain(input_ids=short).logits, ours(input_ids=short).logits
    assert torch.equal(found, expected)
    grads = []
    for model in (tiny_llama().to(dtype).double(), plain, ours):
        model(input_ids=short).logits.double().square().mean().backward()
        grads.append(model.model.layers[1].self_attn.k_proj.weight.grad)
    exact, theirs, own = grads
    assert relative_error(own, exact) <= 1.1 * relative_error(theirs, exact)


@pytest.mark.parametrize("mode", SPARSE)
def test_every_backend_gives_the_same_logits(tiny_llama, mode):
    sparsity = parse_sparsity(SPARSE[mode])
    by_reference = attached(tiny_llama().double(), sparsity, backend="reference")(input_ids=ids()).logits
    full = attached(tiny_llama().double(), None)(input_ids=ids()).logits
    assert (by_reference - full).abs().max() > 0.01, "a sparse layout that changes nothing proves nothing"
    found = attached(tiny_llama().double(), sparsity, backend="blockwise")(input_ids=ids()).logits
    torch.testing.assert_close(found, by_reference, rtol=0, atol=1e-5)  # transformers' norms are fp32


@pytest.mark.parametrize("mode", [None, *SPARSE])
def test_a_packed_row_has_the_logits_of_its_documents_alone(tiny_llama, mode):
    sparsity = None if mode is None else parse_sparsity(SPARSE[mode])
    model = attached(tiny_llama(), sparsity)
    tokens = ids(1)
    bounds = [0, 28, 32, LENGTH]  # starts are multiples of the block
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)])[None]
    packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    for first, last in itertools.pairwise(bounds):
        alone = model(input_ids=tokens[:, first:last], use_cache=False).logits
        torch.testing.assert_close(packed[:, first:last], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", [None, *SPARSE])
@pytest.mark.parametrize("prefill", [1, 17, 40])
def test_a_decoding_step_has_the_logits_of_the_full_forward_pass(tiny_llama, mode, prefill):
    sparsity = None if mode is None else parse_sparsity(SPARSE[mode])
    model = attached(tiny_llama().double(), sparsity)
    tokens = ids()
    with torch.no_grad():
        full = model(input_ids=tokens).logits
        cache = DynamicCache(config=model.config)
        steps = [model(input_ids=tokens[:, :prefill], past_key_values=cache).logits]
        cut = min(prefill + 3, LENGTH)  # several tokens at once, then one by one
        steps.append(model(input_ids=tokens[:, prefill:cut], past_key_values=cache).logits)
        for t in range(cut, LENGTH):
            steps.append(model(input_ids=tokens[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-5)  # transformers' norms are fp32


def test_a_sequence_beyond_the_master_length_is_refused_in_training_and_decoding(tiny_llama):
    model = attached(tiny_llama(max_position_embeddings=128), parse_sparsity(SPARSE["bigbird"]))
    with pytest.raises(ConfigError, match=r"made for 64 tokens, the sequence has 65"):
        model(input_ids=ids(num_tokens=65))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids(num_tokens=64), past_key_values=cache)
        with pytest.raises(ConfigError, match=r"made for 64 tokens, the sequence has 65"):
            model(input_ids=ids(num_tokens=1), past_key_values=cache)


def test_a_layout_that_extends_itself_serves_longer_sequences_and_changes_none_of_the_old_rows(tiny_llama):
    base = tiny_llama(max_position_embeddings=256).double()
    model = attached(base, parse_sparsity(SPARSE["bslongformer"]))
    tokens = ids(num_tokens=150)
    short = model(input_ids=tokens[:, :60]).logits
    longer = model(input_ids=tokens).logits
    torch.testing.assert_close(longer[:, :60], short, rtol=0, atol=1e-5)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens[:, :140], past_key_values=cache)
        rest = [model(input_ids=tokens[:, t : t + 1], past_key_values=cache).logits for t in range(140, 150)]
    torch.testing.assert_close(torch.cat(rest, 1), longer[:, 140:], rtol=0, atol=1e-5)


def test_layers_attend_by_layouts_of_their_own(tiny_llama):
    """Layer by layer: the hidden states before and after a layer are those of a model that is all like it."""
    window, fixed = parse_sparsity(SPARSE["bslongformer"]), parse_sparsity(SPARSE["fixed"])
    layers = (None, window, fixed)
    base = tiny_llama(num_hidden_layers=3).double()
    mixed = attached(copy.deepcopy(base), *layers)
    hidden = mixed(input_ids=ids(), output_hidden_states=True).hidden_states
    for index, sparsity in enumerate(layers):
        uniform = attached(copy.deepcopy(base), sparsity)
        seen: list[torch.Tensor] = []
        layer = uniform.model.layers[index]
        enter = layer.register_forward_pre_hook(lambda _, given, index=index: (hidden[index], *given[1:]))
        leave = layer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        uniform(input_ids=ids())
        if index < 2:  # the last hidden state is normalised
            torch.testing.assert_close(seen[0], hidden[index + 1], rtol=0, atol=1e-6)
        enter.remove()
        leave.remove()
        assert (uniform(input_ids=ids()).logits - mixed(input_ids=ids()).logits).abs().max() > 1e-3


@pytest.mark.parametrize("mode", [None, *SPARSE])
def test_a_token_leaves_the_logits_before_it_to_the_bit(tiny_llama, mode):
    model = attached(tiny_llama(), None if mode is None else parse_sparsity(SPARSE[mode]))
    tokens = ids()
    before = model(input_ids=tokens).logits
    for place in (1, 17, 32, LENGTH - 1):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 61
        after = model(input_ids=other).logits
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


def test_a_step_of_decoding_reads_only_the_keys_that_its_row_sees(tiny_llama):
    """Everything else in the cache is NaN: one read of it would show."""
    window = parse_sparsity(SPARSE["bslongformer"])
    layout = build_layout(window, 4, 16)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 1, 8, generator=generator)
    key, value = (torch.randn(1, 2, LENGTH, 8, generator=generator) for _ in range(2))
    expected, _ = DecodingCore(layout, 0.3).forward(query, key, value)
    seen = token_table(layout, 4, LENGTH)[0, -1]
    assert 0 < seen.sum() < LENGTH / 2
    key[:, :, ~seen], value[:, :, ~seen] = torch.nan, torch.nan
    found, _ = DecodingCore(layout, 0.3).forward(query, key, value)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_padding_at_the_end_changes_nothing_before_it(tiny_llama, is_sparse):
    """What data collators make; each row's tokens as if it stood alone."""
    window = {"mode": "local_sliding_window", "block": 4, "num_sliding_window_blocks": 3}
    model = attached(tiny_llama(), parse_sparsity(window) if is_sparse else None)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, LENGTH - 7 :] = 0
    found = model(input_ids=ids(), attention_mask=mask).logits
    alone = model(input_ids=ids()[:1, :-7]).logits
    torch.testing.assert_close(found[:1, :-7], alone)
    torch.testing.assert_close(found[1], model(input_ids=ids()).logits[1])


def test_a_mask_that_hides_tokens_before_others_is_refused(tiny_llama):
    model = attached(tiny_llama(), None)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    expected = model(input_ids=ids()).logits
    assert torch.equal(model(input_ids=ids(), attention_mask=mask).logits, expected)
    mask[0, 0] = 0
    with pytest.raises(ConfigError, match="attention_mask: hides tokens"):
        model(input_ids=ids(), attention_mask=mask)


def test_dropout_on_attention_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match=r"attention_dropout is 0\.1; only 0 is supported"):
        attached(tiny_llama(attention_dropout=0.1), None)


def test_documents_are_found_where_positions_restart():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2]])
    found = find_documents(positions, 2)
    places = {(group.rows, group.first, group.last) for group in found.groups}
    assert places == {((0, 1), 0, 3), ((0,), 3, 5), ((0,), 5, 6), ((1,), 3, 6)}
    assert find_documents(torch.arange(6)[None], 3).groups[0].rows == (0, 1, 2)


def test_positions_that_skip_are_not_taken_for_documents():
    with pytest.raises(AssertionError, match="positions do not count"):
        find_documents(torch.tensor([[0, 1, 3]]), 1)
    with pytest.raises(AssertionError, match="does not begin with a document"):
        find_documents(torch.tensor([[1, 2, 3]]), 1)


def test_inference_mode_gives_the_same_logits(tiny_llama):
    model = attached(tiny_llama(), parse_sparsity(SPARSE["bslongformer"]))
    expected = model(input_ids=ids()).logits
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids(), position_ids=torch.arange(LENGTH)[None]).logits, expected)
