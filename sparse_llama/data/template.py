"""What stands around a question and its answer: ours (``prompt.py``) or the tokenizer's own (``chat.py``).

A run has one tokenizer object for records and prompts, and with it one template: training, evaluation and
generation cannot differ in it. The adapter's configuration says which one it was.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sparse_llama.config.settings import TemplateName
from sparse_llama.data.chat import ChatTokenizer
from sparse_llama.data.files import Found
from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.data.records import (
    Example,
    MalformedRecordError,
    Message,
    Turn,
    join_context,
    parse_record,
)
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.errors import ConfigError


def with_template(tokenizer: Tokenizer, folder: Path, template: TemplateName) -> Tokenizer:
    """Return what reads records and prompts in a run of ``template``; ``folder`` is the tokenizer's.

    Raises:
        DataError: the tokenizer has no template, or one that does not serve.
    """
    return ChatTokenizer(tokenizer, folder) if template == "tokenizer" else tokenizer


def template_of(tokenizer: Tokenizer) -> TemplateName:
    """Return the template that ``tokenizer`` reads."""
    return "tokenizer" if isinstance(tokenizer, ChatTokenizer) else "alpaca"


def named_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens that stand for no text, by id: begin and end of sequence, those of a template."""
    plain = tokenizer.plain if isinstance(tokenizer, ChatTokenizer) else tokenizer
    ends = {token: plain.name_of(token) for token in (plain.bos_id, plain.eos_id) if token is not None}
    return ends | (tokenizer.marks if isinstance(tokenizer, ChatTokenizer) else {})


def write_records(records: Iterable[Found], tokenizer: Tokenizer | None) -> Iterator[Found]:
    """Yield ``records`` in the template of ``tokenizer``; what it cannot write is malformed."""
    for found in records:
        if found.example is None or not isinstance(tokenizer, ChatTokenizer):
            yield found
            continue
        try:
            yield Found(found.place, tokenizer.write_turns(found.example))
        except MalformedRecordError as error:
            yield Found(found.place, None, str(error))


def write_prompt(tokenizer: Tokenizer, instruction: str, context: str = "") -> str:
    """Return the text that precedes the answer to ``instruction``, which is about ``context``.

    Raises:
        ConfigError: the tokenizer's template cannot write it.
    """
    if not isinstance(tokenizer, ChatTokenizer):
        return alpaca_prompt(instruction, context)
    try:
        return tokenizer.write_prompt([Message("user", join_context(instruction, context))])
    except MalformedRecordError as error:
        raise ConfigError(f"--prompt: {error}") from error


def waiting_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> Example:
    """Return a conversation as turns of which the last has no response yet.

    Args:
        messages: of user and assistant in turns, after at most one of the system; the last is the user's.

    Raises:
        ConfigError: the tokenizer's template cannot write it.
    """
    some_answer = Message("assistant", "-")  # a turn's prompt is the same whatever the answer
    said = [{"role": message.role, "content": message.content} for message in (*messages, some_answer)]
    try:
        example = parse_record({"messages": said})
        if isinstance(tokenizer, ChatTokenizer):
            example = tokenizer.write_turns(example)
    except MalformedRecordError as error:
        raise ConfigError(str(error)) from error
    *before, last = example.turns
    return replace(example, turns=(*before, Turn(last.prompt, "")))
