"""Perplexity: which tokens are scored by which window, and the numbers of a loop written out."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapt
from oracles.adapter_formula import adapted_logits
from oracles.masked_attention import token_table
from transformers import LlamaForCausalLM

from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError, DataError, ModelError
from sparse_llama.evaluation.perplexity import score_responses, score_text
from sparse_llama.evaluation.score import Score
from sparse_llama.evaluation.windows import Window, cut_windows
from sparse_llama.model.assemble import open_model

SPARSE = parse_sparsity({"mode": "local_sliding_window", "block": 4, "num_sliding_window_blocks": 3})
IDS = torch.randint(61, (50,), generator=torch.Generator().manual_seed(8)).tolist()


def score(model: Any, *, window: int, stride: int, ids: list[int] = IDS) -> Score:
    return score_text(model, ids, window=window, stride=stride, source="test")


def losses_by_token(model: LlamaForCausalLM, *, window: int, stride: int) -> list[float]:
    """Return -ln p of IDS[1], IDS[2], ... in fp64, each read alone from its window's first token on."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    plan = getattr(model.model.layers[0].self_attn, "attention_plan", None)
    layout = None if plan is None else plan.layout(0, 64)
    losses = []
    for target in range(1, len(IDS)):
        # the first window that reads up to the token before: its number is how many steps make up for
        # what a window does not reach
        number = max(0, math.ceil((target - window) / stride))
        read = torch.tensor([IDS[number * stride : target]])
        table = token_table(layout, 4, read.shape[1])
        logits = adapted_logits(weights, model.config, read, table=table)[0, -1]
        losses.append(-float(logits.log_softmax(-1)[IDS[target]]))
    return losses


def test_windows_read_and_score_as_in_the_modules_picture():
    assert cut_windows(8, window=4, stride=2) == [Window(0, 4, 4), Window(2, 6, 2), Window(4, 7, 1)]


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (7, 7), (7, 3), (7, 1), (49, 49), (49, 5), (64, 64)])
@pytest.mark.parametrize("num_tokens", [2, 3, 8, 49, 50, 51])
def test_every_token_but_the_first_is_scored_once_with_its_context_before_it(num_tokens, window, stride):
    scored = []
    for number, part in enumerate(cut_windows(num_tokens, window=window, stride=stride)):
        assert part.first == number * stride
        assert part.last - part.first <= window
        for target in range(part.last + 1 - part.num_scored, part.last + 1):
            assert target - part.first >= min(target, window - stride + 1)
            scored.append(target)
    assert scored == list(range(1, num_tokens))


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (16, 16), (16, 5), (10, 1)])
def test_a_base_scores_what_each_token_alone_scores(tiny_llama, window, stride):
    model = tiny_llama()
    expected = losses_by_token(model, window=window, stride=stride)
    found = score(model, window=window, stride=stride)
    assert found.num_tokens == 49
    assert found.loss_sum == pytest.approx(sum(expected), rel=1e-5)  # fp32 logits
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / 49), rel=1e-5)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("sparsity", [None, SPARSE], ids=["dense", "sparse"])
def test_an_adapter_scores_what_each_token_alone_scores(tiny_llama, version, sparsity):
    model = adapt(tiny_llama(), version, sparsity=sparsity)
    expected = losses_by_token(model, window=40, stride=13)
    assert score(model, window=40, stride=13).loss_sum == pytest.approx(sum(expected), rel=1e-5)


def test_more_context_changes_the_score(tiny_llama):
    """Or the stride had no effect above."""
    model = tiny_llama()
    assert score(model, window=16, stride=16).loss_sum != pytest.approx(
        score(model, window=16, stride=1).loss_sum, rel=1e-3
    )


def test_a_model_that_was_never_loaded_is_refused_instead_of_scoring_its_vocabulary(tiny_llama):
    """T3: constant logits have a perplexity of exactly V."""
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    with pytest.raises(ModelError, match="constant logits"):
        score(model, window=16, stride=16)
    with pytest.raises(ModelError, match="constant logits"):
        score_responses(model, [(IDS, IDS)], source="test")


def test_a_bf16_models_losses_are_of_fp32_logits_and_added_up_in_fp64(tiny_llama):
    model = tiny_llama(vocab_size=8).bfloat16()
    ids = torch.randint(8, (3000,), generator=torch.Generator().manual_seed(1))
    expected = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for first in range(0, 2999, 32):
            read, targets = ids[first : first + 32][: 2999 - first], ids[first + 1 : first + 33]
            logits = model(input_ids=read[None], position_ids=torch.arange(len(read))[None]).logits[0]
            expected -= logits.double().log_softmax(-1)[range(len(read)), targets].sum()
    found = score(model, window=32, stride=32, ids=ids.tolist())
    assert found.loss_sum == pytest.approx(
        float(expected), rel=2e-7
    )  # bf16 sums would be 1e-2 off, fp32 1e-6


def test_responses_are_scored_given_their_prompts_and_nothing_else(tiny_llama):
    model = tiny_llama()
    rows = [
        (IDS[:20], [-100] * 12 + IDS[12:20]),
        (IDS[20:30], [-100] * 3 + IDS[23:26] + [-100] * 2 + IDS[28:30]),
    ]
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    expected, count = 0.0, 0
    for ids, labels in rows:
        logits = adapted_logits(weights, model.config, torch.tensor([ids]))[0].log_softmax(-1)
        for token in range(1, len(ids)):
            if labels[token] != -100:
                expected, count = expected - float(logits[token - 1, labels[token]]), count + 1
    found = score_responses(model, rows, source="test")
    assert (found.num_tokens, count) == (13, 13)
    assert found.loss_sum == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (65, 1, r"--window: must be from 1 to 64, the max_position_embeddings of the model, got 65"),
        (0, 1, r"--window: .* got 0"),
        (16, 17, r"--stride: must be from 1 to the window \(16\), .* got 17"),
        (16, 0, r"--stride: .* got 0"),
    ],
)
def test_windows_that_the_model_or_the_text_cannot_have_are_refused(tiny_llama, window, stride, message):
    """T28, and tokens between windows would be left out."""
    with pytest.raises(ConfigError, match=message):
        score(tiny_llama(), window=window, stride=stride)


def test_text_without_a_token_to_predict_is_refused(tiny_llama):
    with pytest.raises(DataError, match="test: 1 tokens; a perplexity needs at least 2"):
        score(tiny_llama(), window=4, stride=4, ids=[5])
    with pytest.raises(DataError, match="test: no response has a token to score"):
        score_responses(tiny_llama(), [(IDS, [-100] * 50)], source="test")


@pytest.mark.real_data
@pytest.mark.parametrize("stride", [512, 200])
def test_stories260k_has_the_perplexity_of_a_plain_transformers_loop(shared: Path, stride):
    """A model and ids that this project has not touched, read window by window as its module says."""
    import sentencepiece

    folder = shared / "models" / "stories260K"
    text = (shared / "data" / "tinystories-sample.txt").read_text(encoding="utf-8")
    text = text[: len(text) // (4 if stride == 512 else 16)]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [processor.bos_id(), *processor.encode(text)]
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    total, scored, first = 0.0, 0, 0
    while scored < len(ids) - 1:
        last = min(first + 512, len(ids) - 1)
        with torch.no_grad():
            logits = theirs(torch.tensor([ids[first:last]])).logits[0].double()
        targets = torch.tensor(ids[first + 1 : last + 1])
        losses = -logits.log_softmax(-1).gather(1, targets[:, None])[scored - first :]
        total, scored, first = total + float(losses.sum()), last, first + stride
    opened = open_model(str(folder))
    found = score(
        opened.model, window=512, stride=stride, ids=[processor.bos_id(), *opened.tokenizer.encode(text)]
    )
    assert found.num_tokens == len(ids) - 1
    assert found.perplexity == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-5)
    assert 3 < found.perplexity < 10  # of 512 pieces
