"""The windows of lm-evaluation-harness, and its rolling log-likelihood, from the installed program itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapt
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import DataError, ModelError
from sparse_llama.evaluation.evaluate import evaluate
from sparse_llama.evaluation.perplexity import score_documents
from sparse_llama.evaluation.windows import cut_as_harness
from sparse_llama.model.assemble import open_model

SPARSE = parse_sparsity({"mode": "local_sliding_window", "block": 4, "num_sliding_window_blocks": 3})
WINDOW = 12
ROUNDING = 1e-6  # relative, of fp32 losses that are added up in another order
LENGTHS = (30, 1, 12, 13, 24, 5)
DRAW = torch.Generator().manual_seed(3)
DOCUMENTS = [torch.randint(3, 61, (length,), generator=DRAW).tolist() for length in LENGTHS]


def word_tokenizer(num_words: int = 61, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, token 17 being ``w17``, but for the two that begin and end a sequence."""
    words = {0: "w0", 1: "<s>", 2: "</s>"} | {token: f"w{token}" for token in range(3, num_words)}
    inner = Tokenizer(models.WordLevel({word: token for token, word in words.items()}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    marks = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="w0", **marks)


def as_words(documents: list[list[int]]) -> list[str]:
    return [" ".join(f"w{token}" for token in document) for document in documents]


def rolling(model: Any, tokenizer: Any, texts: list[str], window: int) -> list[float]:
    """Return lm-eval's rolling log-likelihood of each text."""
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=1, add_bos_token=False)
    asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    return theirs.loglikelihood_rolling(asked, disable_tqdm=True)


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.mark.parametrize("window", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("num_tokens", [1, 2, 6, 7, 8, 13, 14, 15, 39])
def test_windows_read_and_score_the_tokens_that_lm_evals_do(window, num_tokens):
    tokens = list(range(100, 100 + num_tokens))
    pairs = get_rolling_token_windows(tokens, prefix_token=1, max_seq_len=window, context_len=1)
    # its model reads the context and all that is scored but the last token (huggingface.py, "cont_toks")
    theirs = [((context + scored)[:-1], scored) for context, scored in map(make_disjoint_window, pairs)]
    sequence = [1, *tokens]
    ours = [
        (sequence[part.first : part.last], sequence[part.last + 1 - part.num_scored : part.last + 1])
        for part in cut_as_harness(len(sequence), window=window)
    ]
    assert ours == theirs


@pytest.mark.parametrize("kind", ["base", "v1 dense", "v2 sparse"])
def test_the_loss_of_documents_is_lm_evals_rolling_log_likelihood(tiny_llama, kind):
    """Sparse attention as it was trained: in lm-eval it is the same model object."""
    model = tiny_llama()
    if kind != "base":
        model = adapt(model, kind[:2], sparsity=SPARSE if "sparse" in kind else None)
    texts = as_words(DOCUMENTS)
    expected = -sum(rolling(model, word_tokenizer(), texts, WINDOW))
    found = score_documents(model, DOCUMENTS, prefix=1, window=WINDOW, source="test")
    assert found.num_tokens == sum(LENGTHS)
    assert found.loss_sum == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("has_bos", [True, False])
def test_a_document_is_behind_the_beginning_of_sequence_or_else_the_end_of_one(tiny_llama, tmp_path, has_bos):
    model, tokenizer = tiny_llama(), word_tokenizer(bos=has_bos)
    model.config.bos_token_id = 1 if has_bos else None
    with torch.no_grad():  # so that it does not guess, which is refused
        model.lm_head.weight *= 30
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = as_words(DOCUMENTS)
    write_texts(tmp_path / "texts.jsonl", texts)
    result = evaluate(
        open_model(str(tmp_path)), str(tmp_path / "texts.jsonl"), partition="harness", window=WINDOW
    )
    assert result.begins_with_bos == has_bos
    assert result.score.loss_sum == pytest.approx(
        -sum(rolling(model, tokenizer, texts, WINDOW)), rel=ROUNDING
    )


def test_text_without_a_token_is_refused(tiny_llama):
    with pytest.raises(DataError, match="test: 0 tokens; a perplexity needs at least 1"):
        score_documents(tiny_llama(), [[], []], prefix=1, window=WINDOW, source="test")


def test_constant_logits_are_refused(tiny_llama):
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    with pytest.raises(ModelError, match="constant logits"):
        score_documents(model, DOCUMENTS, prefix=1, window=WINDOW, source="test")


@pytest.mark.real_data
def test_stories260k_has_lm_evals_rolling_log_likelihood_of_stories(shared: Path, tmp_path: Path):
    """Of three documents, the longest of 5 windows; ids are SentencePiece's own in both."""
    import sentencepiece

    folder = shared / "models" / "stories260K"
    text = (shared / "data" / "tinystories-sample.txt").read_text(encoding="utf-8")
    texts = [text[:6000], text[6000:6200], text[6200:8000]]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # transformers 5 makes a tokenizer of its own of that file, so words stand for its pieces there
    documents = [processor.encode(text) for text in texts]
    expected = -sum(rolling(theirs, word_tokenizer(512), as_words(documents), 512))
    write_texts(tmp_path / "stories.jsonl", texts)
    opened = open_model(str(folder), dtype=torch.float32)
    result = evaluate(opened, str(tmp_path / "stories.jsonl"), partition="harness")
    assert result.window == 512
    assert result.score.num_tokens == sum(map(len, documents)) > 4 * 512
    assert result.score.loss_sum == pytest.approx(expected, rel=ROUNDING)
