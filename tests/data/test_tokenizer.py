"""Ids are those of the library that made the tokenizer; special tokens in text are text."""

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from sparse_llama.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from sparse_llama.errors import DataError

HARD = [
    " leading",
    "double  space",
    "trailing ",
    "one\ntwo\n\nthree",
    "1234567890",
    "\U0001f642 caf\u00e9",
    "a</s>b<s>",
    "",
]


def test_ids_are_sentencepieces_own(tokenizer: Tokenizer, tokenizer_folder: Path):
    """T13, T14."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    for text in HARD:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_a_normaliser_is_the_library_s_own(tmp_path: Path):
    """T13: OpenLLaMA's folds runs of spaces and newlines; transformers' conversion drops it."""
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["Ann lives in Oslo with two cats."] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(" Ann\n\n lives  in ") == library.encode("Ann lives in")
    assert all(tokenizer.encode(text) == library.encode(text) for text in HARD)


def test_ids_that_pad_a_model_s_vocabulary_and_special_ones_have_no_text(
    tokenizer: Tokenizer, fast_folder: Path
):
    for one in (tokenizer, load_tokenizer(fast_folder)):
        ids = one.encode("hi")
        assert one.bos_id is not None
        assert one.decode([one.bos_id, *ids, one.vocab_size, one.vocab_size + 7, one.eos_id]) == "hi"


def test_an_unfinished_character_is_a_replacement_character(tokenizer: Tokenizer, fast_folder: Path):
    """What a stream waits at: the four bytes of this one are four ids."""
    for one in (tokenizer, load_tokenizer(fast_folder)):
        ids = one.encode("a\U0001f642")
        assert one.decode(ids) == "a\U0001f642"
        assert one.decode(ids[:-1]).endswith("\ufffd")


def test_the_end_of_sequence_in_a_text_ends_nothing(tokenizer: Tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode("before </s> after")


@pytest.fixture
def fast_folder(tmp_path: Path) -> Path:
    """A byte-level BPE like LLaMA 3's, without a tokenizer.model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = RustTokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    made.post_processor = processors.TemplateProcessing(
        single=["<|begin|>", "$A"], special_tokens=[("<|begin|>", 256)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return tmp_path


def test_a_tokenizer_json_serves_where_there_is_no_tokenizer_model(fast_folder: Path):
    tokenizer = load_tokenizer(fast_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)
    for text in [*HARD, "a<|end|>b"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not {256, 257} & set(tokenizer.encode(text))
    assert tokenizer.decode([256, *tokenizer.encode("hi"), 257]) == "hi"


def test_the_end_of_sequence_may_be_named_in_the_models_configuration(fast_folder: Path):
    (fast_folder / "tokenizer_config.json").unlink()
    with pytest.raises(
        DataError, match=r"no end-of-sequence token in tokenizer_config\.json or config\.json"
    ):
        load_tokenizer(fast_folder)
    (fast_folder / "config.json").write_text('{"eos_token_id": [257, 3]}', encoding="utf-8")
    assert load_tokenizer(fast_folder).eos_id == 257
    assert load_tokenizer(fast_folder).bos_id is None


def test_a_folder_without_a_tokenizer_and_a_damaged_one_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no tokenizer; expected tokenizer.model or tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(tokenizer: Tokenizer):
    check_vocabulary(tokenizer, 340)
    check_vocabulary(tokenizer, 512)
    with pytest.raises(DataError, match="has 340 tokens, the model's vocabulary is 339"):
        check_vocabulary(tokenizer, 339)
