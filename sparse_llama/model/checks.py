"""Whether a base model knows anything: the two signs of weights that were never loaded.

A perplexity of exactly V (32000.07 for LLaMA, with fp32 sums over 2,047 tokens) is that of constant logits.
"""

import math

import torch

from sparse_llama.errors import ModelError

CONSTANT_LOGITS_STD = 1e-3  # of a token's logits over the vocabulary; a trained model's is above 1
LOSS_FRACTION = 0.9  # of ln V, the loss of guessing; LLaMA-7B starts at 1.6 where this is 9.3


def check_logits(logits: torch.Tensor, *, source: str, random_weights: bool = False) -> None:
    """Raise ModelError if the (..., V) logits are the same for every word at every token, or not finite."""
    if random_weights:
        return
    spread = logits.detach().float().std(dim=-1).max()
    if not torch.isfinite(logits).all():
        raise ModelError(
            f"{source}: the base model's logits are not finite; the weights are damaged or the dtype "
            "overflows"
        )
    if spread < CONSTANT_LOGITS_STD:
        raise ModelError(
            f"{source}: constant logits (largest standard deviation over the vocabulary "
            f"{float(spread):.1e}); the weights "
            "were most likely not loaded: check that the checkpoint holds this model"
        )


def check_first_loss(loss: float, *, vocab_size: int, source: str, random_weights: bool = False) -> None:
    """Raise ModelError if the mean loss per token before training is no better than guessing.

    Args:
        loss: in nats per labelled token.
    """
    limit = LOSS_FRACTION * math.log(vocab_size)
    if random_weights or loss <= limit:  # NaN is not <= anything
        return
    raise ModelError(
        f"{source}: the first loss is {loss:.3f}, above {LOSS_FRACTION} ln V = {limit:.3f}, where guessing "
        "gives "
        f"{math.log(vocab_size):.3f}; the weights were most likely not loaded, or the tokenizer is of "
        "another model"
    )
