"""Everything a run needs before its first step, made in the order in which mistakes are cheapest to find."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from sparse_llama.adapters.weights import AdapterFile
from sparse_llama.attention.interface import AttentionPlan
from sparse_llama.config.run import Run
from sparse_llama.data.batches import Batch, Batches
from sparse_llama.data.ledger import Ledger
from sparse_llama.data.records import Example
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.model.objective import TokenLoss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Session:
    """A run ready to train."""

    run: Run
    engine: Any  # DeepSpeed's engine has no types
    objective: TokenLoss
    llama: LlamaForCausalLM
    parameters: dict[str, nn.Parameter]
    tokenizer: Tokenizer
    batches: Batches
    validation_batches: list[Batch]
    validation_examples: list[Example]
    ledger: Ledger
    plan: AttentionPlan
    adapter: AdapterFile
    total_steps: int
