"""Attention over rows that ranks share, beside one rank's and the definition; one process of a job.

Prints the largest differences of every cell: of the output and the gradients of query, key and value.
"""

import itertools
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from adapted_models import adapt, shifted, tokens
from oracles.masked_attention import attend as attend_by_definition
from oracles.masked_attention import batch_table, relative_error
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.attention.core import CoreAttention
from sparse_llama.attention.interface import AttentionPlan, attention_core, plan_attention
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.distributed.sequence import SequenceParallel, join_sequence_group
from sparse_llama.model.objective import TokenLoss

HEADS, TOKENS, WIDTH, SCALING = 8, 312, 8, 0.3
MODES: dict[str, dict[str, Any] | None] = {
    "full": None,
    "bslongformer": {"mode": "bslongformer", "block": 16, "global_block_indices": [0, 3]},
    "bigbird per head": {
        "mode": "bigbird",
        "block": 16,
        "different_layout_per_head": True,
        "num_random_blocks": 1,
    },
}
# Of four parts of 78 tokens, documents cross every cut, lie inside one, and begin at one.
CUTS = ((0, 312), (0, 100, 156, 160, 312))
POSITIONS = torch.stack(
    [torch.cat([torch.arange(last - first) for first, last in itertools.pairwise(row)]) for row in CUTS]
)


def draw(num_kv_heads: int, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query, key, value and the output's gradient of whole rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, TOKENS, WIDTH) for heads in (HEADS, num_kv_heads, num_kv_heads, HEADS)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    # strides as transformers leaves them: a projection's tokens come before its heads
    return [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in drawn]


def run(
    plan: AttentionPlan, tensors: list[torch.Tensor], positions: torch.Tensor, heads: range | None
) -> list[torch.Tensor]:
    """Return output and gradients of the layer's attention, as the seam to transformers makes it."""
    *inputs, grad = [tensor.detach() for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    module: Any = SimpleNamespace(attention_plan=plan, layer_idx=0)
    core = attention_core(module, leaves[0], leaves[1], positions, SCALING, heads)
    output = CoreAttention.apply(core, *leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def compare(
    sequence: SequenceParallel,
    mode: str,
    num_kv_heads: int,
    *,
    dtype: torch.dtype = torch.float64,
    heads: range | None = None,
) -> dict[str, Any]:
    """Return a cell's differences; ``heads`` are those that are given, all others' are left out."""
    options = MODES[mode]
    sparsity = None if options is None else parse_sparsity(options)
    alone = plan_attention([sparsity], num_heads=HEADS, master_length=TOKENS, seed=3)
    shared = plan_attention([sparsity], num_heads=HEADS, master_length=TOKENS, seed=3, sequence=sequence)
    tensors = draw(num_kv_heads, seed=dist.get_rank() // sequence.size, dtype=dtype)
    if heads is not None:
        group = HEADS // num_kv_heads
        kv_heads = range(heads.start // group, heads.stop // group)
        tensors = [
            tensor[:, own.start : own.stop]
            for tensor, own in zip(tensors, (heads, kv_heads, kv_heads, heads), strict=True)
        ]
    size = TOKENS // sequence.size
    own_tokens = slice(sequence.rank * size, (sequence.rank + 1) * size)
    found = run(
        shared, [tensor[:, :, own_tokens] for tensor in tensors], POSITIONS[:, own_tokens].clone(), heads
    )
    one_rank = [tensor[:, :, own_tokens] for tensor in run(alone, tensors, POSITIONS, heads)]
    table = batch_table(alone.layout(0, TOKENS), HEADS, POSITIONS)
    table = table if heads is None else table[:, heads.start : heads.stop]
    *inputs, grad = (tensor.detach().double() for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output = attend_by_definition(leaves[0], leaves[1], leaves[2], table, SCALING)
    defined = [output, *torch.autograd.grad(output, leaves, grad)]
    defined = [tensor[:, :, own_tokens] for tensor in defined]
    return {
        "output_is_equal": torch.equal(found[0], one_rank[0]),
        "from_one_rank": max(map(relative_error, found, one_rank)),
        "from_definition": max(map(relative_error, found, defined)),
        "density": float(table[0].float().mean()) * 2,
    }


def compare_models(sequence: SequenceParallel, version: str) -> dict[str, float]:
    """Return the differences of a sparse adapted model in fp64: its loss over shared rows, and the gradients'
    sum over the ranks, from those of one rank."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config).double().eval()
    options = {"mode": "bigbird", "block": 8, "different_layout_per_head": True, "num_random_blocks": 1}
    adapt(model, version, start_layer=1, sparsity=parse_sparsity(options))
    plan: AttentionPlan = model.model.layers[0].self_attn.attention_plan  # type: ignore[assignment]
    bounds = ((0, 64), (0, 20, 30, 32, 64))
    counted = [
        torch.cat([torch.arange(last - first) for first, last in itertools.pairwise(row)]) for row in bounds
    ]
    positions, ids = torch.stack(counted), tokens(num_tokens=64)
    labels = shifted(ids.masked_fill(torch.arange(64) < 45, -100))  # none in the first part
    whole = {"input_ids": ids, "position_ids": positions, "shift_labels": labels}
    loss, gradients = differentiate(model, whole)
    size = 64 // sequence.size
    own = slice(sequence.rank * size, (sequence.rank + 1) * size)
    plan.sequence = sequence
    own_loss, own_gradients = differentiate(model, {name: table[:, own] for name, table in whole.items()})
    for tensor in (own_loss, *own_gradients.values()):
        dist.all_reduce(tensor, group=sequence.group)
    return {
        "loss": abs(float(own_loss / loss) - 1),
        "gradient": max(relative_error(own_gradients[name], one) for name, one in gradients.items()),
        "least_gradient": min(float(one.norm()) for one in gradients.values()),
    }


def differentiate(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed loss and the gradient of every trainable tensor."""
    names, parameters = zip(*trainable_parameters(model), strict=True)
    loss = TokenLoss(model)(**batch)
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach(), dict(zip(names, gradients, strict=True))


def exchange_16_bits(sequence: SequenceParallel) -> bool:
    """Return whether bf16 parts arrive as they were sent."""
    rank, size = dist.get_rank(), sequence.size
    first = rank - sequence.rank
    sent = torch.tensor([[100 * rank + 10 * to] for to in range(size)], dtype=torch.bfloat16)
    expected = torch.tensor(
        [[100 * (first + source) + 10 * sequence.rank] for source in range(size)], dtype=torch.bfloat16
    )
    return torch.equal(sequence.exchange(sent), expected)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = []
    for size in json.loads(sys.argv[1]):
        sequence = join_sequence_group(size)
        assert sequence is not None
        cells: dict[str, Any] = {
            f"{mode}, {kv} kv heads": compare(sequence, mode, kv) for mode in MODES for kv in (8, 2)
        }
        cells["one kv head"] = compare(sequence, "bigbird per head", 1)
        cells["fp32"] = compare(sequence, "bigbird per head", 2, dtype=torch.float32)
        cells["bf16"] = compare(sequence, "bigbird per head", 8, dtype=torch.bfloat16)
        cells["second half of the heads"] = compare(sequence, "bigbird per head", 2, heads=range(4, 8))
        models = {version: compare_models(sequence, version) for version in ("v1", "v2")}
        exchanges = exchange_16_bits(sequence)
        results.append({"cells": cells, "models": models, "exchanges_16_bits": exchanges})
    print("RESULT " + json.dumps(results), flush=True)
    dist.destroy_process_group()
