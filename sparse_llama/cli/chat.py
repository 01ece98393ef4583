"""``launch/generate.py --chat``: a conversation in the terminal, in the template of the training run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sparse_llama.errors import ConfigError, SparseLlamaError

if TYPE_CHECKING:
    from sparse_llama.data.records import Message
    from sparse_llama.model.assemble import OpenedModel

HELP = """\
/reset          begin anew, with nothing said
/adapter off    answer as the base does; /adapter on: with the adapter again; /adapter: say which
/again          answer the last question once more, such as after switching
/history        show what was said
/exit           leave, as the end of input does; Ctrl-C stops an answer"""


class Chat:
    """A conversation with a model: what was said, and whether its adapter answers."""

    def __init__(self, opened: "OpenedModel", *, max_new_tokens: int | None, **sampling: Any) -> None:
        self._opened, self._most, self._sampling = opened, max_new_tokens, sampling
        self.messages: list[Message] = []
        """Of user and assistant in turns; the last is the assistant's."""
        self._switched_off = ExitStack()
        self.is_adapted = opened.adapter_file is not None

    def answer(self, said: str) -> Iterator[str]:
        """Yield the answer's pieces as they come. What came is remembered, also where it was stopped; a
        question without any answer is not.

        Raises:
            SparseLlamaError: the model has no room for the conversation, or its template cannot write it.
        """
        from sparse_llama.data.encode import encode_turns
        from sparse_llama.data.records import Message
        from sparse_llama.data.template import waiting_turns
        from sparse_llama.generation import longest_sequence, room_after, stream_after

        asked = [*self.messages, Message("user", said)]
        tokenizer = self._opened.templated
        ids = encode_turns(waiting_turns(tokenizer, asked), tokenizer).ids[:-1]  # but the end of an answer
        longest, limit = longest_sequence(self._opened.model)
        if len(ids) >= longest:
            raise ConfigError(
                f"the conversation has {len(ids)} tokens, and {longest} are the {limit}; /reset begins anew"
            )
        room = room_after(self._opened.model, len(ids))
        length = room if self._most is None else min(room, self._most)
        pieces: list[str] = []
        try:
            for piece in stream_after(
                self._opened.model, tokenizer, ids, max_new_tokens=length, **self._sampling
            ):
                pieces.append(piece)
                yield piece
        finally:
            text = "".join(pieces)
            if text.strip():
                self.messages = [*asked, Message("assistant", text)]

    def forget(self) -> None:
        """Begin anew."""
        self.messages = []

    def take_back(self) -> str:
        """Forget the last question and its answer; return the question.

        Raises:
            ConfigError: nothing was asked yet.
        """
        if not self.messages:
            raise ConfigError("/again: nothing was asked yet; ask something first")
        question = self.messages[-2].content
        self.messages = self.messages[:-2]
        return question

    def switch(self, *, is_adapted: bool) -> None:
        """Answer with the adapter, or as the base does.

        Raises:
            ConfigError: the model has no adapter that can be switched.
        """
        from sparse_llama.adapters.bank import bank_of, disable_adapters

        if bank_of(self._opened.model) is None:
            raise ConfigError("/adapter: this model has none to switch; give a base and --adapter")
        if is_adapted == self.is_adapted:
            return
        if is_adapted:
            self._switched_off.close()
        else:
            self._switched_off.enter_context(disable_adapters(self._opened.model))  # type: ignore[arg-type]
        self.is_adapted = is_adapted


def converse(chat: Chat, read: Callable[[], str | None]) -> None:
    """Answer what is read until there is no more.

    Args:
        read: returns a line, or None at the end of input.
    """
    while (line := read()) is not None:
        said = line.strip()
        if said in ("/exit", "/quit"):
            return
        try:
            if said.startswith("/"):
                said = _obey(chat, said)
            if said:
                _print(chat.answer(said))
        except SparseLlamaError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def read_line(shown: str) -> str | None:
    """Return a line of standard input, with editing and earlier lines where it is a terminal; None at its
    end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (input() edits lines and recalls earlier ones once it is there)
    try:
        return input(shown if sys.stdin.isatty() else "")
    except EOFError:
        print()
        return None


def _obey(chat: Chat, command: str) -> str:
    """Do what a command says; return a question to answer, if it has one."""
    match command.split():
        case ["/reset"]:
            chat.forget()
            print("(begun anew)")
        case ["/again"]:
            return chat.take_back()
        case ["/history"]:
            for message in chat.messages:
                print(f"{message.role}: {message.content.strip()}")
        case ["/adapter", "on" | "off" as state]:
            chat.switch(is_adapted=state == "on")
            print(f"(the adapter is {state})")
        case ["/adapter"]:
            print(f"(the adapter is {'on' if chat.is_adapted else 'off'})")
        case ["/help"]:
            print(HELP)
        case _:
            raise ConfigError(f"{command}: no such command; /help lists them")
    return ""


def _print(pieces: Iterator[str]) -> None:
    """Print an answer as it comes; Ctrl-C ends it, not the chat."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        print(" (stopped)", end="")
    print("\n")
