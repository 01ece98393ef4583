"""Loss on the response alone, the end of sequence included; what is cut is counted."""

import pytest

from sparse_llama.data.encode import encode_example, encode_pair, encode_turns
from sparse_llama.data.ledger import Tally
from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.data.records import Example, Turn, plain_text
from sparse_llama.data.tokenizer import Tokenizer

IGNORED = -100
PROMPT = alpaca_prompt("Where does Ann live?")


def test_labels_are_the_response_and_the_end(tokenizer: Tokenizer):
    tally = Tally()
    (document,) = encode_example(Example((Turn(PROMPT, "In Oslo."),)), tokenizer, 512, tally)
    prompt_ids = tokenizer.encode(PROMPT)
    assert document.ids[: 1 + len(prompt_ids)] == [1, *prompt_ids]
    assert document.ids[-1] == 2
    cut = 1 + len(prompt_ids)
    assert document.labels == [IGNORED] * cut + document.ids[cut:]
    assert tokenizer.decode(document.ids[cut:]) == "In Oslo."
    assert (tally.records, tally.tokens_labelled, tally.tokens_masked) == (1, len(document.ids) - cut, cut)


@pytest.mark.parametrize("response", ["letters", "7 digits", "\nnewline", " space", "  two", "\U0001f642"])
def test_the_ids_of_a_prompt_are_a_prefix_whatever_follows(tokenizer: Tokenizer, response: str):
    """T12."""
    prompt, answer = encode_pair(PROMPT, response, tokenizer)
    assert prompt == tokenizer.encode(PROMPT)
    assert tokenizer.decode(prompt + answer) == PROMPT + response
    if not response.startswith("\n"):  # this tokenizer has a piece of two newlines
        assert prompt + answer == tokenizer.encode(PROMPT + response)


@pytest.mark.parametrize(("prompt", "response"), [("### Instruc", "tion:"), ("### Response:\n", "\nAnn")])
def test_what_would_merge_is_encoded_apart_and_no_space_comes_between(
    tokenizer: Tokenizer, prompt: str, response: str
):
    ids = tokenizer.encode(prompt)
    assert tokenizer.encode(prompt + response)[: len(ids)] != ids, "merges, or this shows nothing"
    before, after = encode_pair(prompt, response, tokenizer)
    assert before == ids
    assert tokenizer.decode(before + after) == prompt + response


def test_a_cut_response_has_no_end_and_a_prompt_without_room_is_dropped(tokenizer: Tokenizer):
    """T10, T11."""
    example, tally = Example((Turn(PROMPT, "In Oslo, far away."),)), Tally()
    prompt_length = 1 + len(tokenizer.encode(PROMPT))
    whole = prompt_length + len(tokenizer.encode(PROMPT + "In Oslo, far away.")) - prompt_length + 2
    (cut,) = encode_example(example, tokenizer, prompt_length + 3, tally)
    assert len(cut.ids) == prompt_length + 3
    assert cut.ids[-1] != tokenizer.eos_id
    assert (tally.truncated, tally.dropped, tally.tokens_dropped) == (1, 0, whole - prompt_length - 3)
    assert encode_example(example, tokenizer, prompt_length, tally) == []
    assert (tally.records, tally.truncated, tally.dropped) == (2, 1, 1)


def test_every_answer_of_a_chat_is_learned_and_ends(tokenizer: Tokenizer):
    turns = (Turn(PROMPT, "In Oslo."), Turn("### Instruction:\nWho?\n\n### Response:\n", "Ann."))
    (document,) = encode_example(Example(turns), tokenizer, 512, Tally())
    labelled = [label for label in document.labels if label != IGNORED]
    answers = [list(encode_pair(turn.prompt, turn.response, tokenizer)[1]) for turn in turns]
    assert labelled == [*answers[0], 2, *answers[1], 2]


def test_a_long_text_loses_no_token(tokenizer: Tokenizer):
    text, tally = "Ann lives in Oslo. " * 40, Tally()
    pieces = encode_example(plain_text(text), tokenizer, 64, tally)
    whole = [1, *tokenizer.encode(text), 2]
    assert all(len(piece.ids) <= 64 for piece in pieces)
    predicted = [label for piece in pieces for label in piece.labels if label != IGNORED]
    assert predicted == whole[1:]  # the first token has nothing before it
    assert (tally.tokens_read, tally.tokens_labelled, tally.tokens_dropped) == (len(whole), len(whole) - 1, 0)


def test_the_first_token_is_never_predicted_where_no_beginning_is_marked(tokenizer: Tokenizer):
    tokenizer.bos_id = None
    document = encode_turns(plain_text("Ann lives"), tokenizer)
    assert document.ids == [*tokenizer.encode("Ann lives"), 2]
    assert document.labels == [IGNORED, *document.ids[1:]]


def test_tokens_read_and_repeated_are_those_labelled_masked_and_dropped(tokenizer: Tokenizer):
    """A record that is cut, one that is dropped, and a text in pieces."""
    tally, length = Tally(), 4 + len(tokenizer.encode(PROMPT))
    cut, dropped = (Turn(prompt, "In Oslo, far away.") for prompt in (PROMPT, PROMPT + "far away " * 9))
    for example in (Example((cut,)), Example((dropped,)), plain_text("Ann lives in Oslo. " * 40)):
        encode_example(example, tokenizer, length, tally)
    assert (tally.records, tally.truncated, tally.dropped) == (3, 1, 1)
    assert tally.tokens_repeated > 0
    in_documents = tally.tokens_labelled + tally.tokens_masked
    assert tally.tokens_read + tally.tokens_repeated == in_documents + tally.tokens_dropped
