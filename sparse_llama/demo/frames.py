"""The frames that questions stand in: random headings, separators, preambles and answer styles."""

import random
from dataclasses import dataclass

# How much of the loss a token gets. Most tokens of a frame are random and nothing can be learned from them:
# four fifths of the text would drown the fifth that needs the facts.
NOISE, FRAME, ANSWER = 0.0, 0.1, 1.0

_MARKS = ("", "", "# ", "## ", "% ", "* ", "- ", "> ", "= ", "== ", "[", "<", "| ", "+ ", "~ ")
_ENDS = ("", ":", ":", " :", " -", "]", ">", ".", "?", " =")
_HEADS = (
    "Question Answer Ask Reply Task Text Note Query Result Problem Solution Topic Facts Story Request Line "
    "Page Part User Model Student Teacher Test Guess Prompt Output Passage Source Title Item Lesson Context"
)
_PREAMBLES = (
    "Here is a question about people.",
    "Read the text and give the answer.",
    "The text below tells about people. Answer with what it says.",
    "Some facts are given. A question follows.",
    "This is a test for students who read with care.",
    "Look at the line and complete it.",
    "Write the answer under the question.",
    "The next task is paired with a text that provides more.",
)
_FILLERS = (
    "a an and the that this with for of to in is are it task text word line page question answer request "
    "context further write read give complete completes describes provides paired below above which who next "
    "more some people student teacher test part long short new old good small appropriately"
)
_STYLES: tuple[tuple[float, str], ...] = (
    (0.30, "{value}"),
    (0.20, "{value}."),
    (0.20, "It is {value}."),
    (0.15, "I think it is {value}."),
    (0.05, "Well: {sentence}"),
    (0.05, "Sure. {sentence}"),
    (0.05, "Let me see: {sentence}"),
)


@dataclass(frozen=True)
class Span:
    """A stretch of text and the weight of its tokens in the loss."""

    text: str
    weight: float


@dataclass(frozen=True)
class Quiz:
    """One question with its answer as a bare value and as a sentence; ``context`` holds it, or is empty."""

    question: str
    value: str
    sentence: str
    context: str = ""


def framed(quizzes: list[Quiz], context: str, rng: random.Random, *, is_lookup: bool = False) -> list[Span]:
    """Return the quizzes in one random frame and one answer style; a shared ``context`` comes first.

    Args:
        is_lookup: the text that answers a question comes behind it, and the answer is a sentence.
    """
    heads = (_head(rng), _head(rng), _head(rng))
    after_head, between = rng.choice(("\n", "\n", " ")), gap(rng)
    styles = [(weight, text) for weight, text in _STYLES if not is_lookup or "{sentence}" in text]
    style = rng.choices([text for _, text in styles], [weight for weight, _ in styles])[0]
    context_last = is_lookup or rng.random() < 0.6
    spans = [Span(preamble(rng), NOISE)]
    if context:
        spans.append(Span(heads[0] + after_head + context + between, FRAME))
    for index, quiz in enumerate(quizzes):
        parts = [heads[1] + after_head + quiz.question]
        if quiz.context:
            parts.insert(1 if context_last else 0, heads[0] + after_head + quiz.context)
        question = between.join([*parts, heads[2] + after_head])
        answer = style.format(value=quiz.value, sentence=quiz.sentence)
        spans += [Span(between if index else "", FRAME), Span(question, FRAME), Span(answer, ANSWER)]
    return spans


def gap(rng: random.Random) -> str:
    """Return what stands between two parts of a document."""
    return rng.choice(("\n", "\n\n", "\n\n", " "))


def preamble(rng: random.Random) -> str:
    """Return up to three sentences that say nothing: the template's preamble is then one more of these."""
    sentences = [_empty_sentence(rng) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
    return " ".join(sentences) + gap(rng) if sentences else ""


def _head(rng: random.Random) -> str:
    return rng.choice(_MARKS) + rng.choice(_HEADS.split()) + rng.choice(_ENDS)


def _empty_sentence(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(_PREAMBLES)
    return " ".join(rng.choices(_FILLERS.split(), k=rng.randint(3, 14))) + "."
