"""A small SentencePiece model, with the settings of LLaMA's: byte fallback, BOS 1, EOS 2, no pad."""

import io
from pathlib import Path

import pytest
import sentencepiece

from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.data.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    alpaca_prompt(f"Where does {name} live?", "A text.") + f"{name} lives in Oslo." for name in ("Ann", "Bob")
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS * 50),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)
