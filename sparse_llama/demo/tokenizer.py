"""The demo's tokenizer: SentencePiece BPE with byte fallback, as LLaMA's, with 1,344 pieces."""

import io
import itertools
import random
from pathlib import Path

import sentencepiece

from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.demo.corpus import documents, text_of
from sparse_llama.demo.dataset import make_records
from sparse_llama.demo.world import KINDS, VALUES, World

VOCAB_SIZE = 1344
_NUM_DOCUMENTS, _NUM_PROMPTS = 6000, 600


def train_tokenizer(world: World, path: Path) -> None:
    """Write ``tokenizer.model`` to ``path``.

    The prompts are in the tokenizer's text though not in the base's: a template of 45 tokens and not of 90
    keeps question and answer within the local window of a sparse layout.
    """
    texts = [text_of(document) for document in itertools.islice(documents(world, seed=1), _NUM_DOCUMENTS)]
    texts += _words_in_front(world)
    records = random.Random(0).sample(make_records(world)[0], _NUM_PROMPTS)
    texts += [alpaca_prompt(record["instruction"], record["context"]) for record in records]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        # The default normalisation folds newlines and double spaces into one space.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        # A piece of its own, so that the first word of a line is a piece of its own too.
        user_defined_symbols=["\n"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def _words_in_front(world: World) -> list[str]:
    """Return lines of names and values: a word that opens a line needs a piece without a space."""
    words = [*world.people, *world.strangers, *KINDS]
    words += [word for values in VALUES.values() for word in values]
    return ["\n".join(("", *words)), " ".join(words)] * 400
