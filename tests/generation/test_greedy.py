"""Greedy answers: what the whole forward pass would choose, token by token, whatever shares the batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapt, shifted
from oracles.adapter_formula import adapted_logits
from oracles.masked_attention import token_table
from oracles.word_tokenizer import WordTokenizer

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.attention.interface import attach_attention, plan_attention
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError, ModelError
from sparse_llama.generation import continuation, generate_batch, generate_stream, longest_sequence
from sparse_llama.model.assemble import open_model
from sparse_llama.model.objective import TokenLoss

SPARSE = parse_sparsity(
    {
        "mode": "fixed",
        "block": 4,
        "num_local_blocks": 2,
        "different_layout_per_head": True,
        "num_different_global_patterns": 2,
    }
)
PROMPT = "w7 w31 w3 w50 w12 w9 w44 w28 w5 w19 w33"
TOKENIZER: Any = WordTokenizer()


def words(ids: list[int]) -> str:
    return "".join(f" w{token}" for token in ids if token != TOKENIZER.bos_id)


def greedy_by_formula(model: Any, prompt: list[int], num_new: int, layout=None) -> list[int]:
    """Return the arg max of the last logits, each from all tokens at once in fp64."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    ids = list(prompt)
    for _ in range(num_new):
        table = token_table(layout, model.config.num_attention_heads, len(ids))
        logits = adapted_logits(weights, model.config, torch.tensor([ids]), table=table)
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def never_ends(model: Any) -> Any:
    """Return ``model`` unable to say the end of sequence, so that comparisons have their full length."""
    head = model.lm_head
    head.weight.data[TOKENIZER.eos_id] = 0.0
    if hasattr(head, "adapter_bias"):
        head.adapter_bias.data[TOKENIZER.eos_id] = -1e4
        head.adapter_scale.data[TOKENIZER.eos_id] = 1.0
    return model


def test_a_base_answers_as_transformers_own_generate(tiny_llama):
    model = never_ends(tiny_llama())
    prompt = [1, *TOKENIZER.encode(PROMPT)]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
    assert len(expected) == 20
    assert generate_batch(model, TOKENIZER, [PROMPT], 20) == [words(expected.tolist())]


@pytest.mark.parametrize("sparsity", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_cached_decoding_chooses_what_the_formula_over_all_tokens_does(tiny_llama, version, sparsity):
    model = never_ends(adapt(tiny_llama(), version, sparsity=sparsity))
    layout = model.model.layers[0].self_attn.attention_plan.layout(0, 64)
    expected = greedy_by_formula(model, [1, *TOKENIZER.encode(PROMPT)], 24, layout)
    assert len(set(expected)) > 4, "a model that repeats itself proves little"
    assert generate_batch(model, TOKENIZER, [PROMPT], 24) == [words(expected)]
    pieces = generate_stream(model, TOKENIZER, PROMPT, max_new_tokens=24)
    assert "".join(pieces) == words(expected)


def test_the_sparse_layout_and_the_gates_change_the_answer(tiny_llama):
    """Or the test above compared what could not differ."""
    dense, sparse = (never_ends(adapt(tiny_llama(), "v1", sparsity=sparsity)) for sparsity in (None, SPARSE))
    ungated = never_ends(adapt(tiny_llama(), "v1", is_trained=False))
    answers = [generate_batch(model, TOKENIZER, [PROMPT], 24)[0] for model in (dense, sparse, ungated)]
    assert len(set(answers)) == 3


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_after_a_further_training_step_answers_are_the_new_models(tiny_llama, version):
    """T18: prompt keys cached by the first answers would still be used."""
    model: Any = adapt(tiny_llama(), version, sparsity=SPARSE)
    ids = torch.tensor([[1, *TOKENIZER.encode(PROMPT)]])
    before = generate_batch(model, TOKENIZER, [PROMPT], 24)
    optimizer = torch.optim.SGD([parameter for _, parameter in trainable_parameters(model)], lr=0.5)
    TokenLoss(model.train())(ids, torch.arange(12)[None], shifted(ids)).backward()
    torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trainable_parameters(model)], 5.0)
    optimizer.step()
    never_ends(model.eval())
    layout = model.model.layers[0].self_attn.attention_plan.layout(0, 64)
    expected = greedy_by_formula(model, ids[0].tolist(), 24, layout)
    after = generate_batch(model, TOKENIZER, [PROMPT], 24)
    assert after == [words(expected)]
    assert after != before


@pytest.mark.parametrize("sparsity", [None, SPARSE], ids=["dense", "sparse"])
def test_prompts_of_all_lengths_are_answered_as_one_by_one(tiny_llama, sparsity, monkeypatch):
    monkeypatch.setattr("sparse_llama.generation.MAX_ROWS", 2)
    model = adapt(tiny_llama(), "v2", sparsity=sparsity)
    prompts = ["w3 w4 w5", "w9", PROMPT, "w4 w3 w5", "w8", "", "w5 w4 w3", "w3 w4 w5 w6"]
    together = generate_batch(model, TOKENIZER, prompts, 12)
    assert together == [generate_batch(model, TOKENIZER, [prompt], 12)[0] for prompt in prompts]
    assert len(set(together)) > 4


def test_an_answer_ends_before_the_end_of_sequence_and_the_others_go_on(tiny_llama):
    model = never_ends(adapt(tiny_llama(), "v1"))
    prompts = ["w3 w4 w5", "w9 w9 w9"]
    first, second = generate_batch(model, TOKENIZER, prompts, 12)
    said = first.split()
    length = next(i for i in range(2, 12) if said[i] not in {*said[:i], *second.split()})
    ends_early: Any = WordTokenizer()
    ends_early.eos_id = TOKENIZER.encode(said[length])[0]
    model.config.eos_token_id = None
    expected = words(TOKENIZER.encode(first)[:length])
    assert generate_batch(model, ends_early, prompts, 12) == [expected, second]
    assert "".join(generate_stream(model, ends_early, prompts[0], max_new_tokens=12)) == expected


def test_every_end_that_the_configuration_names_ends_an_answer(tiny_llama):
    model = never_ends(adapt(tiny_llama(), "v1"))
    (whole,) = generate_batch(model, TOKENIZER, [PROMPT], 12)
    model.config.eos_token_id = [60, TOKENIZER.encode(whole)[6]]
    (cut,) = generate_batch(model, TOKENIZER, [PROMPT], 12)
    assert 0 < len(cut.split()) <= 6
    assert whole.startswith(cut)


def test_a_batch_stops_at_the_models_length_with_right_answers(tiny_llama):
    """T28: beyond it positions were never seen, or the layout ends."""
    model = never_ends(adapt(tiny_llama(max_position_embeddings=16), "v1"))
    prompt = [1, *TOKENIZER.encode(PROMPT)]
    expected = greedy_by_formula(model, prompt, 4)
    assert generate_batch(model, TOKENIZER, [PROMPT], 50) == [words(expected)]


def test_a_prompt_without_room_for_an_answer_is_refused_in_one_line(tiny_llama):
    model = adapt(tiny_llama(max_position_embeddings=12), "v1")
    message = (
        "12 tokens leave no room to answer in 12, the max_position_embeddings of the model; shorten it to"
    )
    with pytest.raises(ModelError, match=message):
        generate_batch(model, TOKENIZER, [PROMPT], 1)
    with pytest.raises(ModelError, match=message):
        generate_stream(model, TOKENIZER, PROMPT, max_new_tokens=1)


def test_a_longer_answer_than_the_model_has_positions_is_refused_with_what_fits(tiny_llama):
    model = tiny_llama(max_position_embeddings=20)
    with pytest.raises(ModelError, match=r"--max_new_tokens: 9 after a prompt of 12 .* use at most 8$"):
        generate_stream(model, TOKENIZER, PROMPT, max_new_tokens=9)
    assert len("".join(generate_stream(never_ends(model), TOKENIZER, PROMPT, max_new_tokens=8)).split()) == 8


def test_a_sparse_adapter_is_as_long_as_its_master_layout_where_that_cannot_grow(tiny_llama):
    model = tiny_llama()
    random_blocks = parse_sparsity({"mode": "bigbird", "block": 4, "num_random_blocks": 1})
    plan = plan_attention([random_blocks] * 4, num_heads=4, master_length=24, seed=0)
    attach_attention(model, plan)
    assert longest_sequence(model) == (24, "master_length of the sparse layout")
    with pytest.raises(ModelError, match=r"24 = the master_length of the sparse layout; use at most 12$"):
        generate_stream(model, TOKENIZER, PROMPT, max_new_tokens=13)
    assert len("".join(generate_stream(model, TOKENIZER, PROMPT, max_new_tokens=12)).split()) <= 12


def test_nothing_to_continue_is_refused(tiny_llama):
    tokenizer: Any = WordTokenizer()
    tokenizer.bos_id = None
    with pytest.raises(ConfigError, match="--prompt: empty"):
        generate_stream(tiny_llama(), tokenizer, "", max_new_tokens=1)


@pytest.mark.real_data
def test_stories260k_continues_the_beginning_of_sequence_as_published(shared: Path):
    opened: Any = open_model(str(shared / "models" / "stories260K"))
    published = (shared / "models" / "stories260K" / "GREEDY.txt").read_text(encoding="utf-8")
    streamed = "".join(generate_stream(opened.model, opened.tokenizer, "", max_new_tokens=200))
    assert streamed[: len(published)] == published
    assert generate_batch(opened.model, opened.tokenizer, [""], 200) == [streamed]
    prompt_ids = [opened.tokenizer.bos_id]
    theirs = opened.model.generate(torch.tensor([prompt_ids]), max_new_tokens=200, do_sample=False)
    assert continuation(opened.tokenizer, prompt_ids, theirs[0, 1:].tolist()) == streamed
