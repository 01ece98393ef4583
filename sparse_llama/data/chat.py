"""The tokenizer's own chat template: prompts and responses as its model was trained to read them.

A conversation is written by transformers' ``apply_chat_template`` and then taken apart: a prompt is what the
template writes before an answer (``add_generation_prompt``), a response the answer up to the token that ends
its turn. What the template writes behind the last turn is left out, as generation stops there.

Ids are those of the written text with the template's tokens as tokens. Where a tokenizer is a
``tokenizer.model``, the texts between these are encoded one by one, as LLaMA 2's own code does; transformers'
conversion of such a file drops a space in front of some.

Text that looks like one of these tokens cannot be told from it, so a record that holds some is malformed: a
data set cannot end a turn.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_llama.config.section import show_plain
from sparse_llama.data.records import Example, MalformedRecordError, Message, Turn
from sparse_llama.data.tokenizer import FAST_NAME, MODEL_NAME, Tokenizer
from sparse_llama.errors import DataError

_KEY = "sparse_llama.data.template"
_INSTEAD = 'use template "alpaca"'
_SAMPLE = (Message("user", "question"), Message("assistant", "answer"))


class ChatTokenizer:
    """Reads what the chat template writes, the tokens in it included; ``plain`` reads text as it stands.

    The template writes the beginning of sequence itself, and the end of sequence is that of a turn.
    """

    def __init__(self, plain: Tokenizer, folder: Path) -> None:
        self.plain = plain
        self._folder = folder
        self._writer = _load_writer(folder)
        written = self._write_sample(_SAMPLE)
        tokens = self._writer.added_tokens_decoder
        self._marks = {
            token.content: number
            for number, token in tokens.items()
            if token.special or (token.content.strip() and token.content in written)
        }
        self._encode = _encoder(plain, folder, self._marks)
        self.end_text = self._find_end(written)
        self.bos_id: int | None = None
        self.eos_id: int = self._marks[self.end_text]
        self.vocab_size: int = max(plain.vocab_size, 1 + max(self._marks.values()))

    @property
    def fingerprint(self) -> str:
        marks = repr((self._writer.get_chat_template(), sorted(self._marks.items()), self.end_text))
        return f"{self.plain.fingerprint} {hashlib.sha256(marks.encode()).hexdigest()}"

    def encode(self, text: str) -> list[int]:
        """Return the ids of written text."""
        return self._encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``, without the template's tokens."""
        marks = set(self._marks.values())
        return self.plain.decode([token for token in ids if token not in marks])

    def name_of(self, token: int) -> str:
        """Return what the vocabulary calls a token."""
        return self.marks.get(token) or self.plain.name_of(token)

    @property
    def marks(self) -> dict[int, str]:
        """The tokens that the template writes or could write, by id."""
        return {number: text for text, number in self._marks.items()}

    def write(self, messages: Sequence[Message], *, is_asked: bool = False) -> str:
        """Return a conversation as the template writes it; one that ``is_asked`` goes on with an answer.

        Raises:
            MalformedRecordError: the template refuses it, such as a system message that it has no place for.
        """
        said = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._writer.apply_chat_template(said, tokenize=False, add_generation_prompt=is_asked)
        except Exception as error:  # a template is a program: it raises what it likes
            reason = show_plain(str(error)) or type(error).__name__
            raise MalformedRecordError(f"messages: the chat template refuses them ({reason})") from error

    def write_prompt(self, messages: Sequence[Message]) -> str:
        """Return what precedes the answer to ``messages``; raises as ``write`` and ``write_turns``."""
        self._check_marks(messages)
        return self.write(messages, is_asked=True)

    def write_turns(self, example: Example) -> Example:
        """Return the example with its turns as the template writes them; plain text stays what it is.

        Raises:
            MalformedRecordError: a message holds the text of a token, or what the template writes before an
                answer is not what it writes when the answer is there.
        """
        if not example.messages:
            return example
        self._check_marks(example.messages)
        answers = [number for number, one in enumerate(example.messages) if one.role == "assistant"]
        written = self.write(example.messages[: answers[-1] + 1])
        turns: list[Turn] = []
        place = 0
        for number in answers:
            prompt = self.write(example.messages[:number], is_asked=True)
            start, end = len(prompt), written.find(self.end_text, len(prompt))
            if not written.startswith(prompt) or end < 0:
                raise MalformedRecordError(
                    f"messages[{number}]: the chat template does not write this answer behind its own "
                    f"prompt; {_INSTEAD}"
                )
            turns.append(Turn(written[place:start], written[start:end]))
            place = end + len(self.end_text)
        return Example(tuple(turns), example.category, example.messages, "tokenizer")

    def _check_marks(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages):
            mark = next((mark for mark in self._marks if mark in message.content), None)
            if mark is not None:
                raise MalformedRecordError(
                    f"messages[{number}]: holds {mark!a}, which the chat template would take for its token"
                )

    def _write_sample(self, messages: Sequence[Message], *, is_asked: bool = False) -> str:
        try:
            return self.write(messages, is_asked=is_asked)
        except MalformedRecordError as error:
            raise DataError(
                f"{_KEY}: the chat template in {self._folder} writes not even one question and answer "
                f"({error}); {_INSTEAD}"
            ) from error

    def _find_end(self, written: str) -> str:
        """Return the token behind the answer of a sample conversation."""
        prompt = self._write_sample(_SAMPLE[:1], is_asked=True)
        before, _, after = written.removeprefix(prompt).partition(_SAMPLE[1].content)
        if not written.startswith(prompt) or any(mark in before for mark in self._marks):
            raise DataError(
                f"{_KEY}: the chat template in {self._folder} does not write an answer behind its generation "
                f"prompt; {_INSTEAD}"
            )
        ends = [(after.find(mark), mark) for mark in self._marks if mark in after]
        if not ends:
            raise DataError(
                f"{_KEY}: the chat template in {self._folder} ends an answer with no token of its own, so "
                f"answers could never end; {_INSTEAD}"
            )
        return min(ends)[1]


def _load_writer(folder: Path) -> Any:
    """Return transformers' tokenizer, which has the template; none of the folder's code is run."""
    from transformers import AutoTokenizer  # 2 s, and other templates never need it

    try:
        writer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        template = writer.get_chat_template() if writer.chat_template else None
    except Exception as error:  # of transformers' and tokenizers' readers, which raise bare ones too
        reason = show_plain(str(error)) or type(error).__name__
        raise DataError(
            f"{_KEY}: transformers cannot open the tokenizer in {folder} ({reason}); {_INSTEAD}"
        ) from error
    if not template:
        raise DataError(f"{_KEY}: the tokenizer in {folder} has no chat template; {_INSTEAD}")
    return writer


def _encoder(plain: Tokenizer, folder: Path, marks: dict[str, int]) -> Callable[[str], list[int]]:
    """Return what gives the ids of written text: ``tokenizer.json``'s own reading of tokens in text, or the
    texts between them one by one."""
    if not (folder / MODEL_NAME).is_file():
        from tokenizers import Tokenizer as RustTokenizer

        reader = RustTokenizer.from_file(str(folder / FAST_NAME))
        reader.no_truncation()
        reader.no_padding()
        return lambda text: reader.encode(text, add_special_tokens=False).ids
    longest_first = sorted(marks, key=len, reverse=True)
    cuts = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for piece in filter(None, cuts.split(text)):
            ids += [marks[piece]] if piece in marks else plain.encode(piece)
        return ids

    return encode
