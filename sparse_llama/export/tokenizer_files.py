"""The tokenizer of an export: the base's own file, and a ``tokenizer.json`` that gives the ids of training.

``AutoTokenizer`` puts BOS in front, as training does, and reads the texts of special tokens as text.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer

from sparse_llama.config.tables import read_table
from sparse_llama.data.fast_tokenizer import begin_with, write_fast_tokenizer
from sparse_llama.data.tokenizer import FAST_NAME, MODEL_NAME, Tokenizer, load_tokenizer
from sparse_llama.errors import ExportError

_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"

TEXTS = (
    "",
    " ",
    "   ",
    "The cat sat on the mat.",
    " one space in front",
    "   three spaces in front",
    "a trailing space ",
    "trailing spaces   ",
    "two  spaces,   three,    four",
    "a line\nand another\n\nand a third after an empty one\n",
    "\n",
    "\n\n\n",
    "\nfirst a newline",
    "newline, then spaces\n   indented\n\tand a tab",
    "\r\nWindows\r\n",
    "0 1 12 123 1234567890 3.14159 1,000,000 2023-04-28 0x1F",
    "word2vec 4th 5% $6.70 #8 @9 a1b2c3",
    "def f(x):\n    return {'a': [x ** 2, -1]}  # comment\n",
    "isn't, can't; \"quoted\" 'single' (round) [square] {curly} <angle> -- a_b*c/d\\e|f~g`h^",
    "don\u2019t \u201cquote\u201d \u2013 \u2014 \u2026 \u2022 \u00a9 \u2122 \u00bd \u20ac",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m stra\u00dfe \u0142\u00f3d\u017a e\u0301",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u03ba\u03cc\u03c3\u03bc\u03b5, \u05e9\u05dc\u05d5\u05dd",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155\ud558\uc138\uc694",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\uff21\uff22\uff23 \uff11\uff12\uff13 \ufb01 \u2460 \u00a0 \u3000 \u200b \ufeff",
    "\U0001f600 \U0001f44d\U0001f3fd \u2764\ufe0f \U0001f469\u200d\U0001f467 \U0001f1f3\U0001f1f4",
    "text\U0001f680text",
    "<s> </s> <unk> <pad> [INST] <|endoftext|> <s></s>",
    "a</s>b <s>c",
    "</s>",
    "<0x0A> <0xFF>",
    "\u2581 \u2581\u2581a",
    "control \x01 \x7f",
    "x" * 300,
    " " * 40 + "deep",
    "Below is an instruction that describes a task.\n\n### Instruction:\nName it.\n\n### Response:\n",
)
"""Leading, double and trailing spaces, newlines, digits, scripts, emoji, the texts of special tokens."""


def write_tokenizer(base: Path, folder: Path) -> None:
    """Copy or make the tokenizer files of ``base`` in ``folder``, and compare them with the training's.

    Raises:
        DataError: the base has no tokenizer.
        ExportError: ``AutoTokenizer`` would give other ids than training did.
    """
    trained = load_tokenizer(base)
    own = _read_config(base / _CONFIG)
    if (base / MODEL_NAME).is_file():
        shutil.copyfile(base / MODEL_NAME, folder / MODEL_NAME)
        write_fast_tokenizer(base / MODEL_NAME, folder, keep=_chat_template(own))
    else:
        file = tokenizers.Tokenizer.from_file(str(base / FAST_NAME))
        _copy_file(base, folder, file, trained)
        text = json.dumps(_copied_config(own, trained, file), indent=2, sort_keys=True) + "\n"
        (folder / _CONFIG).write_text(text, encoding="utf-8")
    if (base / _TEMPLATE).is_file():
        shutil.copyfile(base / _TEMPLATE, folder / _TEMPLATE)
    _compare(trained, base, folder)


def _compare(trained: Tokenizer, base: Path, folder: Path) -> None:
    # Without the model's code: the tokenizer needs none, and a base's own is never run.
    fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    start = [] if trained.bos_id is None else [trained.bos_id]
    for text in TEXTS:
        expected, found = start + trained.encode(text), fast.encode(text)
        if expected != found:
            raise ExportError(
                f"{base}: the exported tokenizer reads {text[:60]!a} as {_ids(found)}, training read it as "
                f"{_ids(expected)}; nothing was written: export with --format native and keep the base's "
                "tokenizer"
            )


def _copy_file(base: Path, folder: Path, file: tokenizers.Tokenizer, trained: Tokenizer) -> None:
    """Copy ``tokenizer.json``, changed only where it does not put training's BOS, and no more, in front."""
    text = "a"
    start = [] if trained.bos_id is None else [trained.bos_id]
    if trained.bos_id is None or file.encode(text).ids == start + trained.encode(text):
        shutil.copyfile(base / FAST_NAME, folder / FAST_NAME)
    else:
        begin_with(file, trained.bos_id)
        file.save(str(folder / FAST_NAME))


def _copied_config(own: dict[str, Any], trained: Tokenizer, file: tokenizers.Tokenizer) -> dict[str, Any]:
    """Return the configuration of a copied ``tokenizer.json``: the base's, but for what would change ids."""
    document = own | {
        # LLaMA's own class builds another tokenizer from the file's vocabulary.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "add_bos_token": trained.bos_id is not None,
        "add_eos_token": False,
        "bos_token": None if trained.bos_id is None else file.id_to_token(trained.bos_id),
        "eos_token": file.id_to_token(trained.eos_id),
    }
    document.pop("auto_map", None)  # no code but ours is exported
    return document


def _ids(ids: list[int]) -> str:
    return str(ids if len(ids) <= 12 else [*ids[:12], "..."])


def _chat_template(config: dict[str, Any]) -> dict[str, Any]:
    return {"chat_template": config["chat_template"]} if config.get("chat_template") else {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_table(path, ExportError, remedy="copy the base's tokenizer again")
    except FileNotFoundError:
        return {}
