"""An evaluation as people and as programs read it: tables and JSON."""

from typing import Any

from sparse_llama.evaluation.answers import by_category
from sparse_llama.evaluation.evaluate import Evaluation
from sparse_llama.evaluation.score import PositionRange, bits_per_byte, word_perplexity
from sparse_llama.reporting.tables import format_seconds, format_share

POSITION_HEADER = ["position", "tokens", "loss", "perplexity"]
_COUNTS = ("records", "dropped", "truncated", "tokens_read", "tokens_dropped")
_HOW_IT_BEGINS = {
    "windows": ("beginning of sequence in front once", "no beginning of sequence"),
    "harness": (
        "each document behind a beginning of sequence",
        "each document behind an end of sequence, as there is no beginning",
    ),
    None: ("each from its beginning of sequence", "no beginning of sequence"),
}


def to_rows(result: Evaluation) -> list[tuple[str, str]]:
    """Return the result as label and value, for a table."""
    is_text = result.measured == "text"
    return [
        ("model", result.model),
        ("data", result.data),
        ("measured", "every token of the text" if is_text else "responses, given their prompts"),
        ("how", f"{_how(result)}, {_HOW_IT_BEGINS[result.partition][not result.begins_with_bos]}"),
        ("attention", result.attention),
        ("positions", result.positions),
        ("precision", f"{result.dtype}, losses fp32, sums fp64"),
        *([] if is_text else [("template", result.template)]),
        *_record_rows(result),
        ("tokens scored", f"{result.score.num_tokens:,}"),
        ("loss per token", f"{result.score.nll_per_token:.4f} nats"),
        ("perplexity", f"{result.score.perplexity:.4f}"),
        *_size_rows(result),
        *_answer_rows(result),
        ("time", format_seconds(result.elapsed_s)),
    ]


def to_json(result: Evaluation) -> dict[str, Any]:
    """Return the result as JSON holds it."""
    tally, size, score = result.tally, result.size, result.score
    answers = {name: _scores(result, name) for name in ("exact_match", "rouge_l")}
    return {
        "perplexity": score.perplexity,
        "nll_per_token": score.nll_per_token,
        "loss_sum": score.loss_sum,
        "tokens": score.num_tokens,
        "words": None if size is None else size.num_words,
        "bytes": None if size is None else size.num_bytes,
        "word_perplexity": None if size is None else word_perplexity(score, size),
        "bits_per_byte": None if size is None else bits_per_byte(score, size),
        "measured": result.measured,
        "partition": result.partition,
        "window": result.window,
        "stride": result.stride,
        "template": result.template,
        "bos": result.begins_with_bos,
        "source": result.data,
        "description": result.model,
        "attention": result.attention,
        "positions": result.positions,
        "dtype": result.dtype,
        "malformed": list(result.malformed),
        "records": None if tally is None else {name: getattr(tally, name) for name in _COUNTS},
        **answers,
        "elapsed_s": result.elapsed_s,
    }


def position_rows(ranges: list[PositionRange]) -> list[list[str]]:
    """Return the rows of a table under POSITION_HEADER."""
    return [
        [
            f"{part.first:,} to {part.last:,}",
            f"{part.score.num_tokens:,}",
            f"{part.score.nll_per_token:.4f}",
            f"{part.score.perplexity:.4f}",
        ]
        for part in ranges
    ]


def positions_to_json(ranges: list[PositionRange]) -> list[dict[str, Any]]:
    """Return ranges of positions, both ends included, as JSON holds them."""
    return [
        {
            "first": part.first,
            "last": part.last,
            "tokens": part.score.num_tokens,
            "nll_per_token": part.score.nll_per_token,
            "perplexity": part.score.perplexity,
        }
        for part in ranges
    ]


def _how(result: Evaluation) -> str:
    if result.partition == "windows":
        return f"window {result.window}, stride {result.stride}"
    if result.partition == "harness":
        return f"lm-evaluation-harness's windows of {result.window}"
    return f"cut at {result.window} tokens"


def _record_rows(result: Evaluation) -> list[tuple[str, str]]:
    tally = result.tally
    rows = [("malformed, skipped", reason) for reason in result.malformed]
    if tally is None:
        return rows
    cut = f"{tally.truncated:,} truncated, {tally.dropped:,} dropped (no room for a response)"
    return [("records", f"{tally.records:,}; {cut}"), *rows]


def _size_rows(result: Evaluation) -> list[tuple[str, str]]:
    score, size = result.score, result.size
    if size is None:
        return []
    return [
        ("perplexity per word", f"{word_perplexity(score, size):,.4f} ({size.num_words:,} words)"),
        ("bits per byte", f"{bits_per_byte(score, size):.4f} ({size.num_bytes:,} bytes)"),
    ]


def _answer_rows(result: Evaluation) -> list[tuple[str, str]]:
    exact, overlap = _scores(result, "exact_match"), _scores(result, "rouge_l")
    if exact is None or overlap is None:
        return []
    rows = [("exact match", f"{format_share(exact['average'])} ({exact['records']} answers)")]
    rows += [(f"  {name}", format_share(share)) for name, share in exact["by_category"].items()]
    rows += [("ROUGE-L", f"{overlap['average']:.3f}")]
    return rows + [(f"  {name}", f"{mean:.3f}") for name, mean in overlap["by_category"].items()]


def _scores(result: Evaluation, name: str) -> dict[str, Any] | None:
    if not result.answers:
        return None
    if name == "exact_match":
        return by_category(result.answers, lambda answer: answer.exact)
    return by_category(result.answers, lambda answer: answer.rouge_l)
