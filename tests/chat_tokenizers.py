"""Tokenizers with chat templates, made on the spot: one of each kind of file."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sparse_llama.config.bundled import MODELS

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Qwen's form; the generation marks are what transformers' ``return_assistant_tokens_mask`` goes by."""
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% elif message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SHORT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
"""Ours, without the sentences in front: words that the bundled base knows."""
TEXTS = ["Where does Ann live?", "Ann lives in Oslo.", "user\nassistant\nsystem\n", "  two  spaces\n\n"]


def write_byte_level(
    folder: Path, template: str | None = CHATML, *, metaspace: str | None = None, **config: Any
) -> Path:
    """Write a ``tokenizer.json`` of bytes and a few merges, as LLaMA 3 and Qwen have it, into ``folder``.

    Args:
        metaspace: where a space is put in front of a text, as converted SentencePiece files do it; None is
            nowhere.
    """
    tokenizer = Tokenizer(models.BPE())
    if metaspace is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)  # type: ignore[arg-type]
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=metaspace)  # type: ignore[arg-type]
        alphabet = sorted({*"".join(TEXTS), "Y", "s", ".", "B", "\U0001f642", "\u2581"})
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    document = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"} | config
    if template is not None:
        document["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def write_sentencepiece(folder: Path, template: str = LLAMA_2) -> Path:
    """Write the bundled ``tokenizer.model`` with a chat template beside it, as LLaMA 2 has it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(MODELS["bundled:tiny-llama"] / "tokenizer.model", folder / "tokenizer.model")
    document = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    document |= {"unk_token": "<unk>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(document), encoding="utf-8")
    return folder
