"""One measurement of one model: what was measured, how, and what came out."""

import time
from dataclasses import dataclass
from typing import Any, Literal

from sparse_llama.config.settings import TemplateName
from sparse_llama.data.encode import encode_example
from sparse_llama.data.ledger import Tally
from sparse_llama.data.tokenizer import check_vocabulary
from sparse_llama.errors import ConfigError
from sparse_llama.evaluation.corpora import Corpus, read_corpus
from sparse_llama.evaluation.exact_match import exact_match, spread
from sparse_llama.evaluation.perplexity import Score, check_windows, score_responses, score_text
from sparse_llama.generation import longest_sequence
from sparse_llama.model.assemble import OpenedModel
from sparse_llama.reporting.tables import format_seconds, format_share

USUAL_WINDOW = 2048
"""Tokens that published perplexities of LLaMA are measured over."""
_COUNTS = ("records", "dropped", "truncated", "tokens_read", "tokens_dropped")


@dataclass(frozen=True)
class Evaluation:
    """A result and everything that it depends on."""

    model: str
    data: str
    measured: Literal["text", "responses"]
    """Every token of a text but the first, or responses given their prompts."""
    score: Score
    window: int
    stride: int | None
    """None where records are measured one by one; ``window`` is then what they are cut at."""
    template: TemplateName
    """Around questions and answers; of no effect on text."""
    begins_with_bos: bool
    attention: str
    positions: str
    dtype: str
    malformed: tuple[str, ...]
    tally: Tally | None
    """What became of records; None for text."""
    exact_match: dict[str, Any] | None
    elapsed_s: float


def evaluate(
    opened: OpenedModel,
    data: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    num_answers: int = 0,
    max_new_tokens: int = 64,
) -> Evaluation:
    """Measure ``opened`` on ``data``: perplexity of text, or the loss of responses given their prompts.

    Args:
        window: None is the length an adapter was trained at, the usual one for other models, or what the
            model has.
        stride: None is the window, which is how published perplexities are measured.
        num_answers: records to answer greedily and compare whole, at equal distances.

    Raises:
        SparseLlamaError: whatever is wrong with the data, the window or the model.
    """
    if num_answers < 0:
        raise ConfigError(f"--exact_match: must be 0 (off) or above, got {num_answers}")
    if max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens: must be at least 1, got {max_new_tokens}")
    started_s = time.perf_counter()
    window = default_window(opened) if window is None else window
    check_windows(opened.model, window, window if stride is None else stride)
    check_vocabulary(opened.tokenizer, opened.model.config.vocab_size)
    corpus = read_corpus(data, opened.templated)
    matches: dict[str, Any] | None = None
    tally: Tally | None = None
    if corpus.text is not None:
        if num_answers:
            raise ConfigError(f"--exact_match: {data} is text without questions; give a data set of records")
        stride = window if stride is None else stride
        score = _score_text(opened, corpus.text, window=window, stride=stride, source=data)
    else:
        if stride is not None:
            raise ConfigError(f"--stride: {data} holds records, which are measured one by one; leave it out")
        tally = Tally()
        score = _score_records(opened, corpus, window=window, source=data, tally=tally)
        if num_answers:
            answerable = [example for example in corpus.examples if example.prompt]
            asked = spread(answerable, num_answers)
            matches = exact_match(opened.model, opened.templated, asked, max_new_tokens)
    return Evaluation(
        model=opened.description,
        data=corpus.source,
        measured="responses" if corpus.text is None else "text",
        score=score,
        window=window,
        stride=stride,
        template=opened.template,
        begins_with_bos=opened.tokenizer.bos_id is not None,
        attention=_attention(opened),
        positions=_positions(opened),
        dtype=str(opened.model.dtype).removeprefix("torch."),
        malformed=corpus.malformed,
        tally=tally,
        exact_match=matches,
        elapsed_s=time.perf_counter() - started_s,
    )


def default_window(opened: OpenedModel) -> int:
    """Return the tokens of a window where none are asked for."""
    longest, _ = longest_sequence(opened.model)
    usual = USUAL_WINDOW if opened.adapter_file is None else opened.adapter_file.seq_length
    return min(longest, usual)


def to_rows(result: Evaluation) -> list[tuple[str, str]]:
    """Return the result as label and value, for a table."""
    is_text = result.measured == "text"
    how = f"window {result.window}, stride {result.stride}" if is_text else f"cut at {result.window} tokens"
    bos = "beginning of sequence in front once" if is_text else "each from its beginning of sequence"
    rows = [
        ("model", result.model),
        ("data", result.data),
        ("measured", "every token of the text" if is_text else "responses, given their prompts"),
        ("how", f"{how}, {bos if result.begins_with_bos else 'no beginning of sequence'}"),
        ("attention", result.attention),
        ("positions", result.positions),
        ("precision", f"{result.dtype}, losses fp32, sums fp64"),
        *([] if is_text else [("template", result.template)]),
        *_record_rows(result),
        ("tokens scored", f"{result.score.num_tokens:,}"),
        ("loss per token", f"{result.score.nll_per_token:.4f} nats"),
        ("perplexity", f"{result.score.perplexity:.4f}"),
    ]
    if result.exact_match is not None:
        asked = result.exact_match["records"]
        rows.append(("exact match", f"{format_share(result.exact_match['average'])} ({asked} answers)"))
        rows += [
            (f"  {name}", format_share(share)) for name, share in result.exact_match["by_category"].items()
        ]
    return [*rows, ("time", format_seconds(result.elapsed_s))]


def to_json(result: Evaluation) -> dict[str, Any]:
    """Return the result as JSON holds it."""
    tally = result.tally
    return {
        "perplexity": result.score.perplexity,
        "nll_per_token": result.score.nll_per_token,
        "tokens": result.score.num_tokens,
        "measured": result.measured,
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
        "exact_match": result.exact_match,
        "elapsed_s": result.elapsed_s,
    }


def _score_text(opened: OpenedModel, text: str, *, window: int, stride: int, source: str) -> Score:
    tokenizer = opened.tokenizer
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    name = opened.description
    return score_text(opened.model, ids, window=window, stride=stride, source=source, model_name=name)


def _score_records(opened: OpenedModel, corpus: Corpus, *, window: int, source: str, tally: Tally) -> Score:
    documents = [
        document
        for example in corpus.examples
        for document in encode_example(example, opened.templated, window, tally)
    ]
    rows = [(document.ids, document.labels) for document in documents]
    return score_responses(opened.model, rows, source=source, model_name=opened.description)


def _attention(opened: OpenedModel) -> str:
    file, plan = opened.adapter_file, opened.plan
    if file is not None and plan is not None and plan.masters:
        return f"{file.layouts}, master of {file.master_length:,} tokens"
    if file is not None and not file.layouts.is_dense:
        return f"dense, though trained with {file.layouts}"
    if getattr(opened.model.config, "layouts", ()):
        return f"sparse, exported, for {longest_sequence(opened.model)[0]:,} tokens"
    return "dense"


def _positions(opened: OpenedModel) -> str:
    file, longest = opened.adapter_file, opened.model.config.max_position_embeddings
    if file is None or file.rope_parameters is None:
        return f"{longest:,}"
    return f"{longest:,}: {file.rope_parameters}"


def _record_rows(result: Evaluation) -> list[tuple[str, str]]:
    tally = result.tally
    rows = [("malformed, skipped", reason) for reason in result.malformed]
    if tally is None:
        return rows
    cut = f"{tally.truncated:,} truncated, {tally.dropped:,} dropped (no room for a response)"
    return [("records", f"{tally.records:,}; {cut}"), *rows]
