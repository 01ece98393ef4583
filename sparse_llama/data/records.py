"""Records of a data set as turns of prompt and response, whichever schema they come in.

=============  ===========================================================  ==================================
schema         columns                                                      source
=============  ===========================================================  ==================================
Dolly          ``instruction``, ``response``; ``context``, ``category``     databricks/databricks-dolly-15k
Alpaca         ``instruction``, ``output``; ``input``                       tatsu-lab/alpaca
messages       ``messages``: list of {``role``, ``content``}                OpenAI's chat format
conversations  ``conversations``: list of {``from``, ``value``}             ShareGPT's
text           ``text``                                                     continued pre-training
=============  ===========================================================  ==================================
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparse_llama.config.section import quote, show_plain
from sparse_llama.config.settings import TemplateName
from sparse_llama.data.prompt import alpaca_prompt, next_turn_prompt

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
_SCHEMAS = (
    "instruction and response (Dolly), instruction and output (Alpaca), messages, conversations, or text"
)


class MalformedRecordError(ValueError):
    """A record that is of no schema; the message says what is wrong with it, not where it is."""


@dataclass(frozen=True)
class Turn:
    """What is given and what is learned; together they are one text."""

    prompt: str
    """With the template around it, ready to be continued; empty for plain text."""
    response: str


@dataclass(frozen=True)
class Message:
    """What one side says, without any template."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Example:
    """One record."""

    turns: tuple[Turn, ...]
    category: str | None = None
    messages: tuple[Message, ...] = ()
    """The turns before a template was put around them; none of plain text."""
    template: TemplateName = "alpaca"
    """What the turns are written in."""

    @property
    def prompt(self) -> str:
        """What the first response answers."""
        return self.turns[0].prompt

    @property
    def response(self) -> str:
        return self.turns[0].response


def join_context(instruction: str, context: str) -> str:
    """Return an instruction and the text that it is about as one message."""
    return f"{instruction}\n\n{context}" if context else instruction


def plain_text(text: str) -> Example:
    """Return a document that is learned from its first word to its last."""
    return Example((Turn("", text),))


def parse_record(record: object) -> Example:
    """Return a record as an example.

    Raises:
        MalformedRecordError: it is no object, of no known schema, or has an empty or wrong field.
    """
    if not isinstance(record, Mapping):
        raise MalformedRecordError(f"must be an object, got {type(record).__name__}")
    category = None if record.get("category") in (None, "") else show_plain(str(record["category"]))
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key in record:
            turns, messages = _turns(record[key], key, role, content)
            return Example(turns, category, messages)
    if "instruction" in record:
        answer = next((key for key in ("response", "output") if key in record), None)
        if answer is not None:
            given = _optional(record, "context" if answer == "response" else "input")
            instruction, response = _required(record, "instruction"), _required(record, answer)
            asked = Message("user", join_context(instruction, given))
            turn = Turn(alpaca_prompt(instruction, given), response)
            return Example((turn,), category, (asked, Message("assistant", response)))
    elif "text" in record:
        return plain_text(_required(record, "text"))
    found = show_plain(", ".join(sorted(map(str, record)))) or "none"
    raise MalformedRecordError(f"columns are {found}; expected {_SCHEMAS}")


def _turns(
    messages: object, key: str, role_key: str, content_key: str
) -> tuple[tuple[Turn, ...], tuple[Message, ...]]:
    """Return the turns of a chat, and its messages: a system message stands before the first instruction,
    and a last message of the user that nobody answers has nothing to learn from."""
    if not isinstance(messages, list) or len(messages) == 0:
        raise MalformedRecordError(f"{key}: must be a list of messages")
    system, waiting = "", ""
    turns: list[Turn] = []
    said: list[Message] = []
    for number, message in enumerate(messages):
        where = f"{key}[{number}]"
        if not isinstance(message, Mapping):
            raise MalformedRecordError(f"{where}: must be an object")
        role = _ROLES.get(str(message.get(role_key)))
        content = _required(message, content_key, where)
        if role == "system" and not turns and not waiting:
            system = f"{content}\n\n"
        elif role == "user" and not waiting:
            waiting = next_turn_prompt(content) if turns else system + alpaca_prompt(content)
        elif role == "assistant" and waiting:
            turns.append(Turn(waiting, content))
            waiting = ""
        else:
            raise MalformedRecordError(
                f"{where}.{role_key}: {quote(str(message.get(role_key)))} cannot stand here; user and "
                "assistant take turns, after at most one system message"
            )
        said.append(Message(role, content))
    if not turns:
        raise MalformedRecordError(f"{key}: no assistant message to learn from")
    return tuple(turns), tuple(said)


def _required(record: Mapping[str, Any], key: str, where: str = "") -> str:
    text = _optional(record, key, where)
    if text.strip() == "":
        raise MalformedRecordError(f"{where}.{key}: empty" if where else f"{key}: empty")
    return text


def _optional(record: Mapping[str, Any], key: str, where: str = "") -> str:
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        name = f"{where}.{key}" if where else key
        raise MalformedRecordError(f"{name}: must be a string, got {type(value).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise MalformedRecordError(f"{where}.{key}: not UTF-8 text" if where else f"{key}: not UTF-8 text")
    return value
