"""Examples to documents of ids and labels: the loss is on responses, the end of sequence included.

The ids of a prompt are a prefix of those of prompt and response together, as generation has the prompt alone
to go on from. The template ends with a newline, where few tokenizers merge; where one would, prompt and
response are encoded apart.

A record that is longer than a row is cut at its end. A cut response has no end of sequence, or the model
would learn to stop in mid-sentence; a record whose prompt leaves no room for a response is dropped. Plain
text is cut into pieces that share one token with the piece before: every token is predicted once, none is
lost.
"""

from sparse_llama.data.chat import ChatTokenizer
from sparse_llama.data.ledger import Tally
from sparse_llama.data.packing import IGNORED, Document
from sparse_llama.data.records import Example
from sparse_llama.data.tokenizer import Tokenizer

_UNMERGED = "\0"  # a character that no vocabulary has in a longer piece


def encode_example(example: Example, tokenizer: Tokenizer, row_length: int, tally: Tally) -> list[Document]:
    """Return the example's documents, none if it is dropped, and count what became of it in ``tally``."""
    whole = encode_turns(example, tokenizer)
    tally.records += 1
    tally.tokens_read += len(whole.ids)
    if example.prompt == "":
        documents = _cut_text(whole.ids, row_length)
        tally.tokens_repeated += len(documents) - 1
        tally.texts_cut += len(documents) > 1
    else:
        documents = _cut_record(whole, row_length, tally)
    for document in documents:
        labelled = sum(label != IGNORED for label in document.labels)
        tally.tokens_labelled += labelled
        tally.longest_document = max(tally.longest_document, len(document.ids))
        tally.tokens_masked += len(document.ids) - labelled
    return documents


def encode_turns(example: Example, tokenizer: Tokenizer) -> Document:
    """Return an example uncut, with the loss on each of its responses."""
    before = ""  # the token that a later turn stands behind: a text's beginning may have other ids
    if isinstance(tokenizer, ChatTokenizer):
        tokenizer, before = (tokenizer, tokenizer.end_text) if example.prompt else (tokenizer.plain, "")
    assert example.prompt == "" or (example.template == "tokenizer") == (before != "")
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    labels = [IGNORED] * len(ids)
    for number, turn in enumerate(example.turns):
        lead = before if number > 0 else ""
        prompt, response = encode_pair(lead + turn.prompt, turn.response, tokenizer)
        prompt = prompt[1:] if lead else prompt
        ids += [*prompt, *response, tokenizer.eos_id]
        labels += [IGNORED] * len(prompt) + [*response, tokenizer.eos_id]
    labels[0] = IGNORED
    return Document(ids, labels)


def encode_pair(prompt: str, response: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt, as it is encoded alone, and those of the response after it."""
    if prompt == "":
        return [], tokenizer.encode(response)
    prompt_ids, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + response)
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole[len(prompt_ids) :]
    # Apart, but not as a text of its own, which would begin with SentencePiece's space.
    before, after = tokenizer.encode(_UNMERGED), tokenizer.encode(_UNMERGED + response)
    if after[: len(before)] == before:
        return prompt_ids, after[len(before) :]
    return prompt_ids, tokenizer.encode(response)


def _cut_record(document: Document, row_length: int, tally: Tally) -> list[Document]:
    excess = len(document.ids) - row_length
    if excess <= 0:
        return [document]
    cut = Document(document.ids[:row_length], document.labels[:row_length])
    if all(label == IGNORED for label in cut.labels):
        tally.dropped += 1
        tally.tokens_dropped += len(document.ids)
        return []
    tally.truncated += 1
    tally.tokens_dropped += excess
    return [cut]


def _cut_text(ids: list[int], row_length: int) -> list[Document]:
    starts = range(0, max(len(ids) - 1, 1), row_length - 1)
    pieces = [ids[start : start + row_length] for start in starts]
    return [Document(piece, [IGNORED, *piece[1:]]) for piece in pieces]
