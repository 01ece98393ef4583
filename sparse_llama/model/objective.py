"""The training loss: cross entropy of the next token over labelled tokens, as a sum.

A sum, because the mean over a micro-batch would weigh the tokens of a short one more: the engine divides by
the global count.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from sparse_llama.data.packing import IGNORED


class TokenLoss(nn.Module):
    """A LLaMA and its loss in one module, which is what DeepSpeed wraps."""

    def __init__(self, llama: LlamaForCausalLM) -> None:
        super().__init__()
        self.llama = llama

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, shift_labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the 0-dim fp32 sum of the cross entropy; 0 with a graph and zero gradients where nothing is
        labelled.

        Args:
            input_ids, position_ids: (B, T).
            shift_labels: (B, T), what each token predicts; -100 is nothing, as at the end of a document.
        """
        hidden = self.llama.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        is_labelled = shift_labels != IGNORED
        # 3 x 4V bytes per row: with V = 32,000 a prompt token's logits would cost 47 times its hidden state
        rows = hidden[is_labelled]  # (labelled, C)
        logits = self.llama.lm_head(rows).float()
        return F.cross_entropy(logits, shift_labels[is_labelled], reduction="sum")
