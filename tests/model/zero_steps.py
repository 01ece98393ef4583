"""Two training steps under DeepSpeed and in plain torch, on the same model; run as a process of its own.

Prints one JSON line per case: losses of both, the largest relative error over all gradients, and which
    tensors got none.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import deepspeed
import torch
from adapted_models import shifted, trainable_state
from deepspeed.utils import logger, safe_get_full_grad

from sparse_llama.adapters.attach import (
    attach_adapters,
    first_trained_layer,
    parameter_groups,
    trainable_parameters,
)
from sparse_llama.attention.interface import AttentionPlan, attach_attention
from sparse_llama.config.settings import AdapterSettings, MemorySettings
from sparse_llama.distributed import ranks
from sparse_llama.memory.checkpointing import checkpoint_layers
from sparse_llama.memory.head_groups import group_heads
from sparse_llama.model.llama import load_llama
from sparse_llama.model.objective import TokenLoss
from sparse_llama.training.masters import read_masters

LEARNING_RATE = 0.02
CHECKPOINTS = {
    "every": {},
    "every second, on the host": {"cpu_checkpointing": True, "number_checkpoints": 2},
    "every second, on a drive": {"cpu_checkpointing": True, "number_checkpoints": 2},
    "every second, of head groups": {"cpu_checkpointing": True, "number_checkpoints": 2},
}
"""Layer inputs that are kept, and where."""


def build(
    folder: str,
    version: str,
    *,
    dtype=torch.float32,
    zero3_config=None,
    checkpointing=None,
    drive=None,
    head_groups=None,
):
    model = load_llama(folder, dtype=dtype, zero3_config=zero3_config).model
    attach_attention(model, AttentionPlan((None,) * model.config.num_hidden_layers))
    settings = AdapterSettings(version=version, prompt_length=3, start_layer=1)
    attach_adapters(model, settings, seed=1, dtype=model.dtype)
    group_heads(model, MemorySettings(head_groups=head_groups))
    checkpoint_layers(model, checkpointing, first_trained_layer(model), nvme_path=drive)
    for name, parameter in trainable_parameters(model):  # at gate 0 a prompt has no gradient
        if name.endswith("zero_init.gate"):
            parameter.data.fill_(0.5)
    return model.train()


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(step))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    return {"input_ids": ids, "position_ids": torch.arange(9).expand(2, 9), "shift_labels": shifted(labels)}


def train_plainly(folder: str, version: str, dtype: torch.dtype = torch.float32):
    model = build(folder, version, dtype=dtype)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=LEARNING_RATE)
    losses, gradients = [], []
    for step in range(2):
        optimizer.zero_grad()
        loss = TokenLoss(model)(**batch(step)) / 12
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in trainable_parameters(model)})
        optimizer.step()
    return losses, gradients, trainable_state(model)


def configuration(stage: int, precision: str, *, offload: bool = False) -> dict:
    zero = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # or every parameter of a tiny model stays whole
    if offload:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
    }


def run(
    folder: str,
    version: str,
    stage: int,
    precision: str,
    checkpoints: str,
    is_partitioned: bool,
) -> dict:
    from sparse_llama.config.deepspeed import ActivationCheckpointing

    config = configuration(stage, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    expected_losses, expected_gradients, expected_state = train_plainly(folder, version)
    model = build(
        folder,
        version,
        dtype=dtype,
        zero3_config=config if is_partitioned else None,
        checkpointing=None if checkpoints == "none" else ActivationCheckpointing(**CHECKPOINTS[checkpoints]),
        drive=folder if checkpoints.endswith("on a drive") else None,
        head_groups=2 if checkpoints.endswith("of head groups") else None,
    )
    groups = parameter_groups(model, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(model=TokenLoss(model), model_parameters=groups, config=config)
    parameters = dict(trainable_parameters(model))
    masters_before = read_masters(engine, parameters)
    losses, missing, worst = [], [], [0.0, 0.0]
    for step in range(2):
        loss = engine(**batch(step)) / 12
        engine.backward(loss)
        losses.append(loss.item())
        for name, parameter in parameters.items():
            gradient = safe_get_full_grad(parameter)
            if gradient is None or not gradient.any():
                missing.append(name)
                continue
            expected = expected_gradients[step][name]
            worst[step] = max(worst[step], float((gradient.float() - expected).norm() / expected.norm()))
        engine.step()
    masters = read_masters(engine, parameters)
    result = {
        "losses": losses,
        "expected_losses": expected_losses,
        "worst_gradients": worst,
        "without_gradient": missing,
        "unmoved": [name for name in masters if torch.equal(masters[name], masters_before[name])],
        "worst_master": max(float((masters[n] - expected_state[n]).abs().max()) for n in masters),
        "master_dtypes": sorted({str(tensor.dtype) for tensor in masters.values()}),
        "inv_freq_dtype": str(model.model.rotary_emb.inv_freq.dtype),
    }
    engine.destroy()
    return result


def compare_weights(folder: str) -> dict:
    """Return which of the partitioned model's weights differ from the plainly loaded one's, gathered
    again."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    whole = load_llama(folder, dtype=torch.float32).model
    model = load_llama(folder, dtype=torch.float32, zero3_config=configuration(3, "fp32")).model
    drawn = load_llama(folder, dtype=torch.float32, random_weights=True).model
    drawn3 = load_llama(
        folder, dtype=torch.float32, random_weights=True, zero3_config=configuration(3, "fp32")
    ).model
    is_partitioned = all(hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters())
    different = []
    for ours, partitioned in ((whole, model), (drawn, drawn3)):
        expected = dict(ours.named_parameters())
        for name, parameter in partitioned.named_parameters():
            with GatheredParameters([parameter]):
                if not torch.equal(parameter, expected.pop(name)):
                    different.append(name)
        different += list(expected)
    rotary = torch.equal(model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    return {
        "is_partitioned": is_partitioned,
        "different": different,
        "rotary_is_equal": rotary,
        "is_tied": is_tied,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ranks.initialize()
    for case in json.loads(sys.argv[1]):
        outcome = compare_weights(case["folder"]) if case.pop("only_weights", False) else run(**case)
        with Path(sys.argv[2]).open("a") as file:
            file.write(json.dumps(outcome) + "\n")
    ranks.finalize()
