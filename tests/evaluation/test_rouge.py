"""ROUGE-L against Google's ``rouge_score``."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from rouge_score import rouge_scorer

from sparse_llama.evaluation.rouge import rouge_l

PAIRS = [
    ("the cat sat on the mat", "the cat lay on a mat"),
    ("The pet of Fera is a donkey.", "the PET of fera -- is a\n\tdonkey"),
    ("a b c d e", "e d c b a"),
    ("a a a b", "a b a a"),
    ("It's 3,000.50 dollars", "its 3000 50 dollars"),
    ("running runs", "run"),  # a stemmer would find both
    ("caf\u00e9 na\u00efve \u0130stanbul", "cafe naive istanbul"),
    ("\u4f60\u597d", "\u4f60\u597d"),
    ("", ""),
    ("", "words"),
    ("words", " \n..."),
    ("same words here", "same words here"),
]


def theirs(reference: str, answer: str) -> float:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    return scorer.score(reference, answer)["rougeL"].fmeasure


@pytest.mark.parametrize(("reference", "answer"), PAIRS)
def test_it_is_the_f_measure_of_rouge_score(reference, answer):
    assert rouge_l(reference, answer) == pytest.approx(theirs(reference, answer), abs=1e-12)
    assert rouge_l(answer, reference) == pytest.approx(theirs(answer, reference), abs=1e-12)


def test_a_sequence_need_not_be_in_one_piece():
    """Lin 2004, section 3.1: "police killed the gunman" has 3 of 4 words of "police kill the gunman"."""
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(3 / 4)
    assert rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(2 / 4)


def test_random_texts_of_few_words_agree():
    draw = random.Random(4)
    for _ in range(300):
        texts = [" ".join(draw.choices("abcde", k=draw.randrange(12))) for _ in range(2)]
        assert rouge_l(*texts) == pytest.approx(theirs(*texts), abs=1e-12), texts


@pytest.mark.real_data
def test_responses_of_dolly_agree(shared: Path):
    """Each beside the one after it, which shares common words, and beside its own second half."""
    lines = (shared / "data" / "dolly-sample.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["response"][:1200] for line in lines]
    found = [
        (rouge_l(one, other), theirs(one, other))
        for text, following in pairwise(texts)
        for one, other in ((text, following), (text, text[len(text) // 2 :]))
    ]
    assert len(found) == 300
    assert [ours for ours, _ in found] == pytest.approx([expected for _, expected in found], abs=1e-12)
    assert sum(0 < ours < 1 for ours, _ in found) > 200
