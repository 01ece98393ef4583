"""Answers and losses of a job of two, in one of its processes; prints one JSON object per case."""

import json
import logging
import sys
import warnings
from typing import Any

import torch
from adapted_models import shifted, tokens
from oracles.word_tokenizer import WordTokenizer

from sparse_llama.adapters.attach import attach_adapters, parameter_groups, trainable_parameters
from sparse_llama.attention.interface import attach_attention, plan_attention
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.data.batches import Batch
from sparse_llama.distributed import ranks
from sparse_llama.evaluation.haystack import Prompt
from sparse_llama.evaluation.loss import mean_token_loss
from sparse_llama.evaluation.perplexity import score_documents, score_text
from sparse_llama.evaluation.retrieval import score_prompts
from sparse_llama.generation import generate_batch
from sparse_llama.model.llama import load_llama
from sparse_llama.model.objective import TokenLoss

SPARSE = parse_sparsity({"mode": "local_sliding_window", "block": 4, "num_sliding_window_blocks": 3})
PROMPTS = ["w7 w31 w3 w50 w12 w9 w44", "w9 w5", "w3 w4", "w7 w31 w3 w50 w12 w9 w8 w8 w8 w8 w8 w8 w8 w8"]
TOKENIZER: Any = WordTokenizer()
CPU = torch.device("cpu")


def build(folder: str, zero3_config: dict[str, Any] | None = None) -> Any:
    model = load_llama(folder, dtype=torch.float32, zero3_config=zero3_config).model
    sparsities = [SPARSE] * model.config.num_hidden_layers
    attach_attention(model, plan_attention(sparsities, num_heads=4, master_length=64, seed=0))
    attach_adapters(model, AdapterSettings(version="v2", prompt_length=3, start_layer=1), seed=1)
    for name, parameter in trainable_parameters(model):
        if name.endswith("zero_init.gate"):
            parameter.data.fill_(0.8)
    return model


def batches() -> list[Batch]:
    """Return four batches with 8, 7, 6 and 0 labelled tokens."""
    ids, positions = tokens(num_rows=4).split(1), torch.arange(9)[None]
    labels = [
        shifted(ids[row].masked_fill(torch.arange(9) < first, -100)) for row, first in enumerate((1, 2, 3, 9))
    ]
    return [Batch(row, positions, label) for row, label in zip(ids, labels, strict=True)]


def look(objective: Any, model: Any, mine: list[Batch]) -> dict[str, Any]:
    """Return what validation sees."""
    model.eval()
    loss = mean_token_loss(objective, mine)
    answers = [generate_batch(model, TOKENIZER, PROMPTS, num_new) for num_new in (9, 3)]
    return {"loss": loss, "again": mean_token_loss(objective, mine), "answers": answers}


def alone(folder: str) -> list[dict[str, Any]]:
    """Return what one process in plain torch sees, before and after a step."""
    model = build(folder)
    objective = TokenLoss(model)
    before = look(objective, model, batches())
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.0), lr=0.5)
    for batch in batches()[:2]:
        (objective.train()(**batch.to(CPU)) / 2).backward()
    torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trainable_parameters(model)], 1.0)
    optimizer.step()
    return [before, look(objective, model, batches())]


def under_zero3(folder: str) -> list[dict[str, Any]]:
    """Return what each rank sees of the model that all ranks hold in parts, before and after that step."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    model = build(folder, config)
    groups = parameter_groups(model, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=TokenLoss(model), optimizer=torch.optim.SGD(groups, lr=0.5), config=config
    )
    mine = batches()[ranks.rank() :: 2]
    seen = [look(engine, model, mine)]
    engine.train()
    engine.backward(engine(**mine[0].to(CPU)))
    engine.step()
    return [*seen, look(engine, model, mine)]


def with_other_logits(folder: str) -> list[str]:
    """Return the answers of a rank whose logits are those of other tokens."""
    model = build(folder)
    if ranks.rank() == 1:
        model.lm_head.register_forward_hook(lambda _, __, logits: logits.roll(7, -1))
    return generate_batch(model.eval(), TOKENIZER, PROMPTS, 6)


def measure(folder: str) -> dict[str, list[float]]:
    """Return sums and counts: of a text in five windows, by position; of three documents; of five prompts."""
    model, ids = build(folder).eval(), tokens(num_rows=1, num_tokens=50)[0].tolist()
    text = score_text(model, ids, window=16, stride=9, source="test")
    documents = [ids[:30], ids[30:31], ids[31:]]
    harness = score_documents(model, documents, prefix=1, window=16, source="test")
    prompts = [
        Prompt("", "", tuple(ids[:-first]), tuple(ids[-first:]), 40 + first % 2, 0.5) for first in range(1, 6)
    ]
    cells = score_prompts(model, TOKENIZER, prompts)
    return {
        "text": [text.loss_sum, text.num_tokens],
        "positions": [*text.loss_sums, *text.counts],
        "documents": [harness.loss_sum, harness.num_tokens],
        "cells": [value for cell in cells for value in (cell.num_trials, cell.exact, cell.loss)],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = sys.argv[1]
    expected = alone(folder) if ranks.rank() == 0 else None
    lone_answers = generate_batch(build(folder), TOKENIZER, PROMPTS, 6) if ranks.rank() == 0 else None
    lone_score = measure(folder)
    ranks.initialize()
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    outcome = {
        "expected": expected,
        "lone_answers": lone_answers,
        "with_other_logits": with_other_logits(folder),
        "lone_score": lone_score,
        "score": measure(folder),
        "under_zero3": under_zero3(folder),  # last, as it patches torch for good
    }
    print("RESULT " + json.dumps(outcome), flush=True)
    ranks.finalize()
