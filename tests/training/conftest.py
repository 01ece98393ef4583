"""A model of a few thousand parameters with its own tokenizer, a data set, and a way to run a configuration
on them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.config.run import Overrides, load_run
from sparse_llama.training.loop import fit

NAMES = ["Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"]
CITIES = ["Oslo", "Lima", "Cairo", "Delhi", "Paris"]


def records() -> list[dict[str, str]]:
    """Facts of unequal length, so that micro-batches have unequal numbers of labelled tokens."""
    rows = []
    for number in range(96):
        name, city = NAMES[number % 8], CITIES[number % 5]
        response = (
            f"{name} lives in {city}."
            if number % 3
            else f"{name} lives in {city}, " + "far away, " * (number % 7)
        )
        rows.append(
            {
                "instruction": f"Where does {name} number {number} live?",
                "context": f"{name} has a house." if number % 2 else "",
                "response": response.strip(),
                "category": "closed_qa" if number % 2 else "closed_book",
            }
        )
    return rows


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model/`` and ``data.jsonl``."""
    folder = tmp_path_factory.mktemp("workplace")
    lines = [json.dumps(row) for row in records()]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model_dir = folder / "model"
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(model_dir)
    text = folder / "text.txt"
    text.write_text(
        "\n".join(f"{r['instruction']} {r['context']} {r['response']}" for r in records()), encoding="utf-8"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(model_dir / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder


SPARSE = {"mode": "bslongformer", "block": 16, "num_sliding_window_blocks": 5, "global_block_indices": [0]}
DOCUMENT: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.03, "weight_decay": 0.02}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "total_num_steps": "auto"}},
    "zero_optimization": {"stage": 0},
    "sparse_attention": SPARSE,
    "sparse_llama": {
        "seq_length": 320,
        "data": {"validation_records": 12},
        "adapter": {"version": "v2", "prompt_length": 4, "start_layer": 1},
        "training": {"steps": 6, "samples": 0},
    },
}


REMOVED = "(removed)"
"""As a change: the key is left out."""


def merge(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(document)
    for key, value in changes.items():
        if value == REMOVED:
            del merged[key]
            continue
        merged[key] = (
            merge(merged[key], value)
            if isinstance(value, dict) and isinstance(merged.get(key), dict)
            else value
        )
    return merged


def write_configuration(workplace: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """Write the small run's JSON with changes into ``folder`` and return its path."""
    here = {
        "sparse_llama": {
            # random weights are what this base has, and the setting that says so
            "model": {"path": str(workplace / "model"), "random_weights": True},
            "data": {"dataset": str(workplace / "data.jsonl")},
        }
    }
    path = folder / "config.json"
    path.write_text(json.dumps(merge(merge(DOCUMENT, here), changes)), encoding="utf-8")
    return path


def train_in(workplace: Path, folder: Path) -> Callable[..., Path]:
    """Return a function that runs the small configuration with changes in this process and returns the output
    folder."""

    def run(name: str, flags: dict[str, Any] | None = None, **changes: Any) -> Path:
        overrides = Overrides(**{"output_dir": folder / name} | (flags or {}))
        fit(load_run(write_configuration(workplace, folder, changes), overrides, world_size=1))
        return folder / name

    return run


@pytest.fixture
def train(workplace: Path, tmp_path: Path) -> Callable[..., Path]:
    return train_in(workplace, tmp_path)


@pytest.fixture(scope="session")
def plain_run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that returns the output folder of a run at stage 0 with changes, for others to be
    compared with; only the first to ask for some changes waits for it."""
    train = train_in(workplace, tmp_path_factory.mktemp("plain"))
    known: dict[str, Path] = {}

    def find(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            known[key] = train(f"run_{len(known)}", **changes)
        return known[key]

    return find
