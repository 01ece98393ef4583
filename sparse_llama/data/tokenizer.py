"""Text to token ids and back, with the very library that the checkpoint's tokenizer was trained with.

Where a checkpoint has a SentencePiece ``tokenizer.model``, ids come from ``sentencepiece`` itself:
transformers 5 converts such a file to a fast tokenizer of its own and drops OpenLLaMA's normaliser on the
way. Otherwise they come from ``tokenizer.json``.

Special tokens that occur in text, such as ``</s>``, are text: a data set cannot end a document.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from sparse_llama.config.paths import is_file
from sparse_llama.config.section import show_plain
from sparse_llama.config.tables import read_table
from sparse_llama.errors import DataError

MODEL_NAME, FAST_NAME = "tokenizer.model", "tokenizer.json"


class Tokenizer(Protocol):
    """What the project needs of a tokenizer."""

    bos_id: int | None
    """Of the beginning of a sequence; None where the tokenizer marks none."""
    eos_id: int
    """Of the end of a sequence."""
    vocab_size: int
    """One more than the largest id."""

    @property
    def fingerprint(self) -> str:
        """A hash of the files that ids come from: tokenizers of one fingerprint give one text the same."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without beginning or end."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``: none of special tokens and of ids that pad a model's vocabulary, U+FFFD
        of an unfinished character."""
        ...

    def name_of(self, token: int) -> str:
        """Return what a vocabulary calls a token, such as ``</s>``."""
        ...


class SentencePieceTokenizer:
    """A ``tokenizer.model``."""

    def __init__(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{path}: not a SentencePiece model ({_first_line(error)}); copy it again"
            ) from error
        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()
        if eos_id < 0:
            raise DataError(f"{path}: has no end-of-sequence token; answers could never end")
        self.bos_id = bos_id if bos_id >= 0 else None  # SentencePiece's -1 is "none", not an id
        self.eos_id: int = eos_id
        self.vocab_size: int = self._processor.vocab_size()
        self._path = path

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._path, self.bos_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([token for token in ids if token < self.vocab_size])

    def name_of(self, token: int) -> str:
        return self._processor.id_to_piece(token)


class FastTokenizer:
    """A ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as RustTokenizer  # 0.1 s, and LLaMA 1 and 2 never need it

        try:
            self._tokenizer = RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a tokenizer ({_first_line(error)}); copy it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.bos_id = self._special(path.parent, "bos")
        eos_id = self._special(path.parent, "eos")
        if eos_id is None:
            raise DataError(
                f"{path.parent}: no end-of-sequence token in tokenizer_config.json or config.json; "
                'name it there as "eos_token"'
            )
        self.eos_id: int = eos_id
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        for name, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            if token is not None and not 0 <= token < self.vocab_size:
                raise DataError(
                    f"{path}: has {self.vocab_size} tokens, and {name}_token_id in config.json is {token}; "
                    "they are of two models"
                )
        self._path = path

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._path, self.bos_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def name_of(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or f"<{token}>"

    def _special(self, folder: Path, name: str) -> int | None:
        token = _table(folder / "tokenizer_config.json").get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return self._tokenizer.token_to_id(token)
        named = _table(folder / "config.json").get(f"{name}_token_id")
        first = named[0] if isinstance(named, list) and named else named
        return first if type(first) is int else None


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model folder.

    Raises:
        DataError: there is none, or it is damaged.
    """
    if is_file(folder / MODEL_NAME):
        return SentencePieceTokenizer(folder / MODEL_NAME)
    if is_file(folder / FAST_NAME):
        return FastTokenizer(folder / FAST_NAME)
    raise DataError(f"{folder}: no tokenizer; expected {MODEL_NAME} or {FAST_NAME} beside the weights")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that has ids which the model has no embedding for.

    Raises:
        DataError: as said. A smaller tokenizer is fine: vocabularies are padded.
    """
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer: has {tokenizer.vocab_size} tokens, the model's vocabulary is {vocab_size}; "
            "they are of two models"
        )


def _fingerprint(path: Path, bos_id: int | None, eos_id: int) -> str:
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()} {bos_id} {eos_id}"


def _table(path: Path) -> dict[str, Any]:
    try:
        return read_table(path, DataError)
    except FileNotFoundError:
        return {}


def _first_line(error: Exception) -> str:
    return show_plain(str(error).strip().split("\n", 1)[0])
