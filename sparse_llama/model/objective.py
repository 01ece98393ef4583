"""The training loss: cross entropy of the next token over labelled tokens, as a sum.

A sum, because the mean over a micro-batch would weigh the tokens of a short one more: the engine divides by
the global count.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from sparse_llama.attention.core import statistics_dtype
from sparse_llama.data.packing import IGNORED
from sparse_llama.memory.loss import TiledHeadLoss


class TokenLoss(nn.Module):
    """A LLaMA and its loss in one module, which is what DeepSpeed wraps.

    Args:
        loss_tile: labelled tokens whose logits exist at a time; None is all of them.
    """

    def __init__(self, llama: LlamaForCausalLM, *, loss_tile: int | None = None) -> None:
        super().__init__()
        self.llama = llama
        head: Any = llama.lm_head
        self.head_loss = None if loss_tile is None else TiledHeadLoss(head, loss_tile)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, shift_labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the 0-dim fp32 sum of the cross entropy (fp64 of an fp64 model); 0 with a graph and zero
        gradients where nothing is labelled.

        Args:
            input_ids, position_ids: (B, T).
            shift_labels: (B, T), what each token predicts; -100 is nothing, as at the end of a document.
        """
        rows = self.labelled_rows(shift_labels)  # (labelled,)
        labels = shift_labels.flatten()[rows]
        hidden = self.llama.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state.flatten(0, 1)  # (B * T, C)
        if self.head_loss is not None:
            return self.head_loss(hidden, rows, labels)
        # 3 x 4V bytes per row: with V = 32,000 a prompt token's logits would cost 47 times its hidden state
        logits = self.llama.lm_head(hidden[rows])
        return F.cross_entropy(logits.to(statistics_dtype(logits.dtype)), labels, reduction="sum")

    def labelled_rows(self, shift_labels: torch.Tensor) -> torch.Tensor:
        """Return which of the B * T tokens predict anything, (labelled,) int64.

        The only place where a shape depends on data: whoever runs without data overrides it.
        """
        return (shift_labels.flatten() != IGNORED).nonzero().squeeze(-1)
