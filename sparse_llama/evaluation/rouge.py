"""ROUGE-L: how much of a reference an answer says in the reference's order (Lin 2004, section 3.1).

The numbers are those of Google's ``rouge_score`` (``rougeL`` without a stemmer), which most papers report:
words are runs of ASCII letters and digits in lower case, so that text in other scripts has none and scores 0.
"""

import re

_BETWEEN_WORDS = re.compile(r"[^a-z0-9]+")


def rouge_l(reference: str, answer: str) -> float:
    """Return the F-measure of the longest common subsequence of words, from 0 to 1.

    Its precision is the share of the answer's words in that sequence, its recall the share of the
    reference's. A text without words scores 0, against another one too.
    """
    wanted, said = _words(reference), _words(answer)
    common = _longest_common(wanted, said)
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return [word for word in _BETWEEN_WORDS.split(text.lower()) if word]


def _longest_common(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence, keeping one row of the usual table."""
    row = [0] * (len(second) + 1)  # of the words of ``first`` so far and each beginning of ``second``
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
