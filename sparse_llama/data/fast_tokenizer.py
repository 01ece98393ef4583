"""A SentencePiece ``tokenizer.model`` as a ``tokenizer.json`` that gives the same ids.

transformers' own conversion of a LLaMA tokenizer drops the normaliser (OpenLLaMA's folds spaces and
newlines) and reads text such as ``</s>`` as a token. Here the parts of the file are translated one to one:
the normaliser's table of characters, extra spaces, the space in front, then BPE. SentencePiece merges the
neighbours whose union has the highest score, the leftmost first; with every pair that makes a piece listed in
order of the piece's score, BPE does the same.

Texts like ``</s>`` are plain text in training, so they are here: ``split_special_tokens`` in
``tokenizer_config.json``. A sequence starts with BOS, as training documents do.

What ``tokenizers`` (0.23) cannot say and SentencePiece can, under a normaliser with a table: characters in
several parts that the table joins, beyond a letter and one accent (Vietnamese and Korean in decomposed form,
half-width Japanese with voice marks). Their ids differ; precomposed text, the usual one, is exact.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

from sparse_llama.errors import ExportError

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _USER_DEFINED, _UNUSED = 1, 2, 4, 5  # SentencePiece's types of pieces
_BPE = 2  # its number of the model type
_ALL = 2**16


def write_fast_tokenizer(source: Path, folder: Path, *, keep: dict[str, Any] | None = None) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for the SentencePiece file ``source``.

    Args:
        keep: entries of the base's own ``tokenizer_config.json`` to carry over, such as a chat template.

    Raises:
        ExportError: the file is of a kind that ``tokenizers`` has no counterpart for.
    """
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(source.read_bytes())
    reason = _obstacle(model)
    if reason:
        raise ExportError(
            f"{source}: {reason}, which a tokenizer.json cannot express; export with --format native and "
            "keep the base's tokenizer"
        )
    pieces = [piece.piece for piece in model.pieces]
    bos, eos = model.trainer_spec.bos_id, model.trainer_spec.eos_id
    tokenizer = Tokenizer(_bpe(model))
    tokenizer.normalizer = normalizers.Sequence(list(_normalizers(model.normalizer_spec)))
    tokenizer.decoder = decoders.Sequence(list(_decoders(model.normalizer_spec)))
    if bos >= 0:
        begin_with(tokenizer, bos)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = (keep or {}) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bos >= 0,
        "add_eos_token": False,
        "unk_token": next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN),
        "bos_token": pieces[bos] if bos >= 0 else None,
        "eos_token": pieces[eos] if eos >= 0 else None,
    }
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def begin_with(tokenizer: Tokenizer, bos: int) -> None:
    """Make ``tokenizer`` put the token ``bos`` in front of every sequence, and nothing behind it."""
    start = tokenizer.id_to_token(bos)
    assert start is not None
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[start, "$A"], pair=[start, "$A", f"{start}:1", "$B:1"], special_tokens=[(start, bos)]
    )


def _obstacle(model: Any) -> str | None:
    """Return what of the file cannot be translated, None if all can."""
    if model.trainer_spec.model_type != _BPE:
        return "is not a BPE model"
    if model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        return "puts spaces behind words, or does not mark them"
    for piece in model.pieces:
        if piece.type == _UNUSED:
            return f"has the unused piece {piece.piece!a}"
        # A single character is never merged as long as no merge names it; longer ones would need a split
        # before BPE, which takes the space in front away from the text behind them.
        if piece.type == _USER_DEFINED and len(piece.piece) > 1:
            return f"has the user-defined piece {piece.piece!a} of several characters"
    return None


def _bpe(model: Any) -> models.BPE:
    """Return the pieces and, in order of their scores, every way to make one of two others."""
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    merges = [
        (-score, vocabulary[whole], cut, whole)
        for whole, score in scores.items()
        for cut in range(1, len(whole))
        if whole[:cut] in scores and whole[cut:] in scores
    ]
    return models.BPE(
        vocab=vocabulary,
        merges=[(whole[:cut], whole[cut:]) for _, _, cut, whole in sorted(merges)],
        unk_token=next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN),
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _normalizers(spec: Any) -> Iterator[normalizers.Normalizer]:
    if spec.precompiled_charsmap:
        table = normalizers.Precompiled(spec.precompiled_charsmap)
        # Precompiled looks letters up, not characters, and CR LF is one of them: it would become one space.
        if table.normalize_str("\r") == table.normalize_str("\n") != "\r":
            yield normalizers.Replace("\r\n", "\n\n")
        yield table
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if spec.add_dummy_prefix:
        yield normalizers.Prepend(_SPACE)  # of nothing it stays nothing, as in SentencePiece
    yield normalizers.Replace(" ", _SPACE)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(rf"{_SPACE}+\z"), "")


def _decoders(spec: Any) -> Iterator[decoders.Decoder]:
    yield decoders.Replace(_SPACE, " ")
    yield decoders.ByteFallback()
    yield decoders.Fuse()
    if spec.remove_extra_whitespaces:
        yield decoders.Strip(" ", _ALL, 0)
    elif spec.add_dummy_prefix:
        yield decoders.Strip(" ", 1, 0)
