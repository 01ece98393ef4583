"""``AutoTokenizer`` on an export gives the ids of training, which are those of ``sentencepiece`` itself."""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from exported_runs import BUNDLED
from transformers import AutoTokenizer, LlamaConfig

from sparse_llama.errors import ExportError
from sparse_llama.export import tokenizer_files
from sparse_llama.export.tokenizer_files import TEXTS, write_tokenizer

ALPHABETS = (
    "ab c  \n\t.,\"'AeLthinds",
    "  \u2581\n\ta</s><unk><0x0A>\u00e9",
    "0123456789 .,-$%",
    "\U0001f600\u2764\ufe0f\U0001f44d\U0001f3fd\u200d a",
    "\u00e4\u00f6\u00fc\u00df\u0142\u010d\u4f60\u597d\uc548\ub155\uff11\ufb01\u2460\u3000\u00a0 x",
)
KINDS = {
    "as OpenLLaMA's": {},
    "digits apart": {"split_digits": True},
    "spaces kept": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "as the bundled one": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["\n"],
    },
    "newlines kept, spaces folded": {"normalization_rule_name": "identity"},
    "no space in front": {"add_dummy_prefix": False},
    "no byte fallback": {"byte_fallback": False},
}


def train(folder: Path, **options) -> Path:
    """Write a ``tokenizer.model`` of 500 pieces, trained as LLaMA's were but for ``options``."""
    lines = (BUNDLED.parent / "data" / "people" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["instruction"] for line in lines[:800]]
    texts += [
        "\uc548\ub155 \u4f60\u597d caf\u00e9 stra\u00dfe 2023-04-28, 3.14159 isn't",
        "a  b   c    d",
    ] * 40
    model = io.BytesIO()
    settings = {"vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | options
    if not settings["byte_fallback"]:
        settings["vocab_size"] = 400
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts), model_writer=model, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, **settings
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def exported(base: Path, folder: Path):
    """Return what ``AutoTokenizer`` makes of the tokenizer files that are written for ``base``."""
    folder.mkdir()
    LlamaConfig().save_pretrained(folder)
    write_tokenizer(base, folder)
    return AutoTokenizer.from_pretrained(folder)


def assert_same_ids(fast, path: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    draw = random.Random(0)
    texts = [
        "".join(draw.choices(alphabet, k=draw.randint(1, 40))) for alphabet in ALPHABETS for _ in range(200)
    ]
    for text in [*TEXTS, *texts]:
        expected = processor.encode(text)
        assert fast(text, add_special_tokens=False).input_ids == expected, ascii(text)
        assert fast(text).input_ids == [processor.bos_id(), *expected]
        if processor.unk_id() not in expected:  # an unknown character is spelled differently
            assert fast.decode(expected) == processor.decode(expected), ascii(text)
    assert (fast.bos_token_id, fast.eos_token_id) == (processor.bos_id(), processor.eos_id())


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_sentencepiece(tmp_path, kind):
    path = train(tmp_path, **KINDS[kind])
    assert_same_ids(exported(tmp_path, tmp_path / "out"), path)


def test_the_bundled_tokenizer_gives_its_ids(tmp_path):
    assert_same_ids(exported(BUNDLED, tmp_path / "out"), BUNDLED / "tokenizer.model")


@pytest.mark.real_data
def test_stories260ks_tokenizer_gives_its_ids(shared, tmp_path):
    base = shared / "models" / "stories260K"
    assert_same_ids(exported(base, tmp_path / "out"), base / "tokenizer.model")


def test_special_tokens_are_left_out_of_answers_and_kept_when_the_tokenizer_is_saved(tmp_path):
    fast = exported(BUNDLED, tmp_path / "out")
    ids = [1, *fast("the end", add_special_tokens=False).input_ids, 2]
    assert fast.decode(ids, skip_special_tokens=True) == "the end"
    fast.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert all(again(text).input_ids == fast(text).input_ids for text in TEXTS)


def test_the_same_file_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        exported(BUNDLED, tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_chat_template_comes_along(tmp_path):
    shutil.copyfile(BUNDLED / "tokenizer.model", tmp_path / "tokenizer.model")
    config = {
        "chat_template": "{{ messages[0].content }}!",
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    fast = exported(tmp_path, tmp_path / "out")
    rendered = fast.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "Hi!"
    assert_same_ids(fast, BUNDLED / "tokenizer.model")


@pytest.fixture
def json_base(tmp_path) -> Path:
    """Return a base with a ``tokenizer.json`` alone, of bytes and with special tokens, as LLaMA 3's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    base = tmp_path / "base"
    base.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat, then the end came"] * 9, trainer)
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    return base


@pytest.mark.parametrize("has_bos", [True, False], ids=["BOS in the file", "BOS in config.json"])
def test_a_tokenizer_json_is_copied_and_gives_its_ids(json_base, tmp_path, has_bos):
    from tokenizers import Tokenizer, processors

    path = json_base / "tokenizer.json"
    own = Tokenizer.from_file(str(path))
    if has_bos:
        own.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
        own.save(str(path))
    config = {"tokenizer_class": "LlamaTokenizerFast", "auto_map": {"AutoTokenizer": ["a--b.C", None]}}
    (json_base / "tokenizer_config.json").write_text(json.dumps(config))
    fast = exported(json_base, tmp_path / "out")
    own.encode_special_tokens = True
    for text in TEXTS:
        assert fast(text).input_ids == [0, *own.encode(text, add_special_tokens=False).ids], ascii(text)
    is_copy = (tmp_path / "out" / "tokenizer.json").read_bytes() == path.read_bytes()
    assert is_copy == has_bos
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "is not a BPE model"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
        ({"user_defined_symbols": ["<sep>"]}, "user-defined piece '<sep>' of several characters"),
    ],
)
def test_a_file_that_tokenizers_cannot_express_is_refused(tmp_path, options, message):
    train(tmp_path, **options)
    with pytest.raises(ExportError, match=message) as caught:
        exported(tmp_path, tmp_path / "out")
    assert "--format native" in str(caught.value)


def test_a_tokenizer_that_reads_a_text_otherwise_is_refused_with_the_text(tmp_path, monkeypatch):
    def careless(source, folder, *, keep):
        write(source, folder, keep=keep)
        path = folder / "tokenizer.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        document["normalizer"]["normalizers"].insert(
            0, {"type": "Strip", "strip_left": True, "strip_right": True}
        )
        path.write_text(json.dumps(document), encoding="utf-8")

    write = tokenizer_files.write_fast_tokenizer
    monkeypatch.setattr(tokenizer_files, "write_fast_tokenizer", careless)
    with pytest.raises(ExportError, match="the exported tokenizer reads ' ' as") as caught:
        exported(BUNDLED, tmp_path / "out")
    assert "\n" not in str(caught.value)
