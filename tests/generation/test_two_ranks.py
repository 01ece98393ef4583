"""Answers and losses in a job of two processes, under ZeRO-3 and without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow  # 20 s: two processes under ZeRO-3

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what both processes found; one start of DeepSpeed for all tests."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return run_ranks(Path(__file__).with_name("two_ranks.py"), 2, str(folder), timeout_s=150)


@pytest.mark.parametrize("when", [0, 1], ids=["before a step", "after a step"])
def test_under_zero3_both_ranks_answer_as_plain_torch_does(outcomes, when):
    expected = outcomes[0]["expected"][when]["answers"]
    assert [outcome["under_zero3"][when]["answers"] for outcome in outcomes] == [expected, expected]
    assert len({*expected[0]}) == 4


@pytest.mark.parametrize("when", [0, 1], ids=["before a step", "after a step"])
def test_the_loss_weighs_the_tokens_of_both_ranks_alike(outcomes, when):
    """Rank 0 has 8 + 6 labelled tokens, rank 1 has 7 + 0."""
    expected = outcomes[0]["expected"][when]["loss"]
    for outcome in outcomes:
        assert outcome["under_zero3"][when]["loss"] == pytest.approx(expected, rel=1e-5)
        assert outcome["under_zero3"][when]["again"] == outcome["under_zero3"][when]["loss"]


def test_the_step_changed_what_is_compared(outcomes):
    before, after = outcomes[0]["expected"]
    assert before["loss"] > after["loss"] + 0.01
    assert before["answers"] != after["answers"]


def test_ranks_that_disagree_give_the_main_ranks_answers(outcomes):
    """Or one would stop before the other, which ZeRO-3 waits for without end."""
    expected = outcomes[0]["lone_answers"]
    assert [outcome["with_other_logits"] for outcome in outcomes] == [expected, expected]


def test_windows_documents_and_prompts_are_shared_out_and_each_token_counts_once(outcomes):
    expected = outcomes[0]["lone_score"]
    assert (expected["text"][1], expected["documents"][1]) == (49, 50)
    assert expected["cells"][::3] == [3, 2]  # trials
    for outcome in outcomes:
        for name, values in expected.items():
            assert outcome["score"][name] == pytest.approx(values, rel=1e-9), name
