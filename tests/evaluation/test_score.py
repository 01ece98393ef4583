"""Scores per word, per byte and by the position in the window."""

import math
from collections import defaultdict

import pytest
import torch
from lm_eval.api.metrics import bits_per_byte as lm_eval_bits_per_byte
from lm_eval.api.metrics import weighted_perplexity
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

from sparse_llama.evaluation.perplexity import score_responses, score_text
from sparse_llama.evaluation.score import Score, bits_per_byte, by_position, text_size, word_perplexity

IDS = torch.randint(61, (200,), generator=torch.Generator().manual_seed(5)).tolist()
PAGES = [" = Oslo = \n \n It is a city @-@ state . \n", "one two", "", "caf\u00e9\t \u4f60\u597d  "]


def score(*losses: float) -> Score:
    return Score((0.0, *losses), (0, *(1 for _ in losses)))


@pytest.mark.parametrize("page", PAGES)
def test_words_and_bytes_are_those_that_lm_eval_divides_by(page):
    theirs = process_results({"page": page}, [-7.0])
    assert text_size([page]).num_words == theirs["word_perplexity"][1]
    assert text_size([page]).num_bytes == theirs["bits_per_byte"][1]
    assert text_size([page, page]).num_bytes == 2 * theirs["bits_per_byte"][1]


def test_words_are_what_white_space_separates():
    assert text_size(["one  two,\nthree"]).num_words == 3


def test_perplexity_per_word_and_bits_per_byte_are_lm_evals_over_all_documents():
    losses = [31.5, 8.25, 3.0, 17.0]
    items = [process_results({"page": page}, [-loss]) for page, loss in zip(PAGES, losses, strict=True)]
    found, size = score(*losses), text_size(PAGES)
    words, in_bytes = ([item[name] for item in items] for name in ("word_perplexity", "bits_per_byte"))
    assert word_perplexity(found, size) == pytest.approx(weighted_perplexity(words), rel=1e-12)
    assert bits_per_byte(found, size) == pytest.approx(lm_eval_bits_per_byte(in_bytes), rel=1e-12)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 6), (64, 64), (64, 50)])
@pytest.mark.parametrize("num_ranges", [1, 3, 16])
def test_by_position_is_what_a_plain_transformers_loop_finds(tiny_llama, window, stride, num_ranges):
    model = tiny_llama()
    losses: defaultdict[int, list[float]] = defaultdict(list)
    scored, first = 0, 0
    while scored < len(IDS) - 1:
        last = min(first + window, len(IDS) - 1)
        with torch.no_grad():
            loss = -model(torch.tensor([IDS[first:last]])).logits[0].double().log_softmax(-1)
        for target in range(scored + 1, last + 1):
            losses[target - first].append(float(loss[target - first - 1, IDS[target]]))
        scored, first = last, first + stride
    found = score_text(model, IDS, window=window, stride=stride, source="test")
    ranges = by_position(found, num_ranges)
    assert sum(part.score.num_tokens for part in ranges) == len(IDS) - 1
    assert ranges[-1].last == window
    for part in ranges:
        expected = [loss for place in range(part.first, part.last + 1) for loss in losses[place]]
        assert part.score.num_tokens == len(expected)
        assert part.score.nll_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        assert part.score.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)


@pytest.mark.parametrize("num_ranges", [1, 2, 3, 7, 10, 50])
def test_ranges_of_positions_leave_nothing_out_and_are_equally_long_to_a_token(num_ranges):
    ranges = by_position(score(*[1.0] * 10), num_ranges)
    assert [place for part in ranges for place in range(part.first, part.last + 1)] == list(range(1, 11))
    sizes = {part.last - part.first for part in ranges}
    assert max(sizes) - min(sizes) <= 1
    assert len(ranges) == min(num_ranges, 10)


def test_positions_at_which_nothing_was_scored_are_no_range():
    found = Score((0.0, 0.0, 0.0, 4.0, 6.0), (0, 0, 0, 2, 1))
    (part,) = by_position(found, 2)
    assert (part.first, part.last, part.score.nll_per_token) == (3, 4, 10.0 / 3)


def test_the_position_of_a_responses_token_counts_its_prompt(tiny_llama):
    found = score_responses(tiny_llama(), [(IDS[:9], [-100] * 6 + IDS[6:9])], source="test")
    assert [place for place, count in enumerate(found.counts) if count] == [6, 7, 8]
