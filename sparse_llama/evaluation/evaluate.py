"""One measurement of one model: what was measured, how, and what came out."""

import time
from dataclasses import dataclass
from typing import Literal

from sparse_llama.config.settings import TemplateName
from sparse_llama.data.encode import encode_example
from sparse_llama.data.ledger import Tally
from sparse_llama.data.tokenizer import check_vocabulary
from sparse_llama.errors import ConfigError
from sparse_llama.evaluation.answers import Answer, answer_records
from sparse_llama.evaluation.corpora import Corpus, read_corpus
from sparse_llama.evaluation.exact_match import spread
from sparse_llama.evaluation.perplexity import check_windows, score_documents, score_responses, score_text
from sparse_llama.evaluation.score import Score, TextSize, text_size
from sparse_llama.generation import longest_sequence
from sparse_llama.model.assemble import OpenedModel
from sparse_llama.model.checks import check_perplexity

Partition = Literal["windows", "harness"]
"""Of text: windows at a stride over all of it, or lm-evaluation-harness's over each document."""
USUAL_WINDOW = 2048
"""Tokens that published perplexities of LLaMA are measured over."""


@dataclass(frozen=True)
class Evaluation:
    """A result and everything that it depends on."""

    model: str
    data: str
    measured: Literal["text", "responses"]
    """Every token of a text but the first, or responses given their prompts."""
    score: Score
    size: TextSize | None
    """Of the text; None for records."""
    partition: Partition | None
    """None where records are measured one by one; ``window`` is then what they are cut at."""
    window: int
    stride: int | None
    """Of the partition into windows."""
    template: TemplateName
    """Around questions and answers; of no effect on text."""
    begins_with_bos: bool
    attention: str
    positions: str
    dtype: str
    malformed: tuple[str, ...]
    tally: Tally | None
    """What became of records; None for text."""
    answers: tuple[Answer, ...]
    """Of the records that were asked."""
    elapsed_s: float


def evaluate(
    opened: OpenedModel,
    data: str,
    *,
    partition: Partition | None = None,
    window: int | None = None,
    stride: int | None = None,
    num_answers: int = 0,
    max_new_tokens: int = 64,
) -> Evaluation:
    """Measure ``opened`` on ``data``: perplexity of text, or the loss of responses given their prompts.

    Args:
        partition: of text; None is ``windows``.
        window: None is the length an adapter was trained at, the usual one for other models, or what the
            model has.
        stride: None is the window, which is how published perplexities are measured.
        num_answers: records to answer greedily and compare with their responses, at equal distances.

    Raises:
        SparseLlamaError: whatever is wrong with the data, the window or the model.
    """
    started_s = time.perf_counter()
    _check_counts(num_answers, max_new_tokens)
    if partition == "harness" and stride is not None:
        raise ConfigError("--stride: --partition harness has windows of its own; leave one of them out")
    window = default_window(opened) if window is None else window
    check_windows(opened.model, window, window if stride is None else stride)
    check_vocabulary(opened.tokenizer, opened.model.config.vocab_size)
    corpus = read_corpus(data, opened.templated)
    tally: Tally | None = None
    answers: list[Answer] = []
    if corpus.text is not None:
        if num_answers:
            raise ConfigError(f"--exact_match: {data} is text without questions; give a data set of records")
        partition = partition or "windows"
        stride = stride or (window if partition == "windows" else None)
        score = _score_text(opened, corpus, window=window, stride=stride, source=data)
    else:
        for flag, value in (("--stride", stride), ("--partition", partition)):
            if value is not None:
                raise ConfigError(
                    f"{flag}: {data} holds records, which are measured one by one; leave it out"
                )
        tally = Tally()
        score = _score_records(opened, corpus, window=window, source=data, tally=tally)
    check_perplexity(
        score.nll_per_token,
        num_tokens=score.num_tokens,
        vocab_size=opened.model.config.vocab_size,
        source=opened.description,
    )
    if num_answers:
        asked = spread([example for example in corpus.examples if example.prompt], num_answers)
        answers = answer_records(opened.model, opened.templated, asked, max_new_tokens)
    return Evaluation(
        model=opened.description,
        data=corpus.source,
        measured="responses" if corpus.text is None else "text",
        score=score,
        size=None if corpus.text is None else _size(corpus, partition),
        partition=partition,
        window=window,
        stride=stride,
        template=opened.template,
        begins_with_bos=opened.tokenizer.bos_id is not None,
        attention=attention_of(opened),
        positions=positions_of(opened),
        dtype=str(opened.model.dtype).removeprefix("torch."),
        malformed=corpus.malformed,
        tally=tally,
        answers=tuple(answers),
        elapsed_s=time.perf_counter() - started_s,
    )


def default_window(opened: OpenedModel) -> int:
    """Return the tokens of a window where none are asked for."""
    longest, _ = longest_sequence(opened.model)
    usual = USUAL_WINDOW if opened.adapter_file is None else opened.adapter_file.seq_length
    return min(longest, usual)


def attention_of(opened: OpenedModel) -> str:
    """Return which attention a model is measured with."""
    file, plan = opened.adapter_file, opened.plan
    if file is not None and plan is not None and plan.masters:
        return f"{file.layouts}, master of {file.master_length:,} tokens"
    if file is not None and not file.layouts.is_dense:
        return f"dense, though trained with {file.layouts}"
    if getattr(opened.model.config, "layouts", ()):
        return f"sparse, exported, for {longest_sequence(opened.model)[0]:,} tokens"
    return "dense"


def positions_of(opened: OpenedModel) -> str:
    """Return how many positions a model has, and how they were stretched."""
    file, longest = opened.adapter_file, opened.model.config.max_position_embeddings
    if file is None or file.rope_parameters is None:
        return f"{longest:,}"
    return f"{longest:,}: {file.rope_parameters}"


def _check_counts(num_answers: int, max_new_tokens: int) -> None:
    if num_answers < 0:
        raise ConfigError(f"--exact_match: must be 0 (off) or above, got {num_answers}")
    if max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens: must be at least 1, got {max_new_tokens}")


def _score_text(
    opened: OpenedModel, corpus: Corpus, *, window: int, stride: int | None, source: str
) -> Score:
    """Return the score of a text in windows; without a stride, of its documents in the harness's."""
    tokenizer, name = opened.tokenizer, opened.description
    if stride is None:
        prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        documents = [tokenizer.encode(document) for document in corpus.documents]
        return score_documents(
            opened.model, documents, prefix=prefix, window=window, source=source, model_name=name
        )
    assert corpus.text is not None
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(corpus.text)
    return score_text(opened.model, ids, window=window, stride=stride, source=source, model_name=name)


def _size(corpus: Corpus, partition: Partition | None) -> TextSize:
    assert corpus.text is not None
    return text_size(corpus.documents if partition == "harness" else [corpus.text])


def _score_records(opened: OpenedModel, corpus: Corpus, *, window: int, source: str, tally: Tally) -> Score:
    documents = [
        document
        for example in corpus.examples
        for document in encode_example(example, opened.templated, window, tally)
    ]
    rows = [(document.ids, document.labels) for document in documents]
    return score_responses(opened.model, rows, source=source, model_name=opened.description)
