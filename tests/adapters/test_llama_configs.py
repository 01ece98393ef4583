"""Adapters on Llama 1, 2 and 3 as published: the keys of each ``config.json``, with the sizes of a test."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapted_models import adapt, tokens
from oracles.adapter_formula import adapted_logits
from oracles.masked_attention import relative_error, token_table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.model.llama import load_llama

ROUNDING = 3e-5  # fp32 against fp64, as in test_zero_init
NUM_TOKENS, NUM_PROMPT_TOKENS = 44, 37
SPARSITIES = {
    "v1": None,
    "v2": parse_sparsity({"mode": "local_sliding_window", "block": 4, "num_sliding_window_blocks": 3}),
}
LLAMA_1 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "vocab_size": 61,
    "rms_norm_eps": 1e-06,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
}
LLAMA_2 = LLAMA_1 | {
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rms_norm_eps": 1e-05,
    "pad_token_id": None,
}
LLAMA_3 = LLAMA_2 | {"rope_theta": 500000.0, "attention_bias": False, "attention_dropout": 0.0}
# Of the wavelengths 6, 32, 167, ... tokens the first stays, the second is in between, the others are scaled.
LLAMA_3_1 = LLAMA_3 | {
    "mlp_bias": False,
    "eos_token_id": [2, 3, 4],
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
        "rope_type": "llama3",
    },
}
LLAMA_3_2 = LLAMA_3_1 | {
    "hidden_size": 40,  # not heads times head_dim
    "head_dim": 16,
    "tie_word_embeddings": True,
    "rope_scaling": LLAMA_3_1["rope_scaling"] | {"factor": 32.0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama 1": LLAMA_1,
    "Llama 2 70B": LLAMA_2,
    "Llama 3 8B": LLAMA_3,
    "Llama 3.1": LLAMA_3_1,
    "Llama 3.2 1B": LLAMA_3_2,
    "with biases": LLAMA_3_1 | {"attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model folder with the published ``config.json``."""
    document = CONFIGS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LlamaForCausalLM(LlamaConfig.from_dict(document))
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at 1 and biases at 0, which hides mistakes
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf-8")
    return tmp_path


def adapted(folder: Path, version: str, **options: Any) -> LlamaForCausalLM:
    model = load_llama(str(folder), dtype=torch.float32).model
    return adapt(model, version, start_layer=1, sparsity=SPARSITIES[version], **options)


def formula(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    attention: Any = model.model.layers[0].self_attn
    table = token_table(
        attention.attention_plan.layout(0, ids.shape[1]), model.config.num_attention_heads, ids.shape[1]
    )
    return adapted_logits(weights, model.config, ids, table=table)


def decoded(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a prompt at once and the tokens after it one by one."""
    cache = DynamicCache(config=model.config)
    parts = ids.split([NUM_PROMPT_TOKENS] + [1] * (NUM_TOKENS - NUM_PROMPT_TOKENS), dim=1)
    return torch.cat(
        [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], 1
    )


@torch.no_grad()
def test_an_untrained_adapter_computes_what_transformers_base_does(folder: Path):
    ids = tokens(num_tokens=NUM_TOKENS)
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    ours = adapted(folder, "v1", is_trained=False)
    assert relative_error(ours(input_ids=ids).logits, theirs(input_ids=ids).logits) < ROUNDING


@pytest.mark.parametrize("version", SPARSITIES)
def test_the_forward_pass_and_decoding_are_the_formula_before_and_after_a_step(folder: Path, version: str):
    model = adapted(folder, version)
    ids = tokens(num_tokens=NUM_TOKENS)
    optimizer = torch.optim.SGD([parameter for _, parameter in trainable_parameters(model)], lr=3.0)
    seen: list[torch.Tensor] = []
    for _ in range(2):
        logits = model(input_ids=ids, use_cache=False).logits
        seen.append(formula(model, ids))
        assert relative_error(logits, seen[-1]) < ROUNDING
        with torch.no_grad():
            assert relative_error(decoded(model, ids), seen[-1]) < ROUNDING
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    assert relative_error(*seen) > 1e-2
