"""Whether a base model knows anything: the signs of weights that were never loaded.

A perplexity of exactly V (32000.07 for LLaMA, with fp32 sums over 2,047 tokens) is that of constant logits.
"""

import math

import torch

from sparse_llama.errors import ModelError

CONSTANT_LOGITS_STD = 1e-3  # of a token's logits over the vocabulary; a trained model's is above 1
LOSS_FRACTION = 0.9  # of ln V, the loss of guessing; LLaMA-7B starts at 1.6 where this is 9.3

# Random weights have logits of a standard deviation s of 0.02 sqrt(C), 1.3 at 7B and 1.8 at 70B, and lose
# s * s / 2 above ln V. Above that a model is sure and wrong, which only weights that were loaded can be;
# below it one knows something, if little: 0.88 ln V is a tiny model's on text of another kind.
GUESSING_NATS = (-0.1, 2.0)  # from ln V
FEW_TOKENS = 100  # whose mean loss may be near ln V by chance


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


def check_perplexity(loss: float, *, num_tokens: int, vocab_size: int, source: str) -> None:
    """Raise ModelError if the mean loss of measured tokens is that of a model that guesses, or no number.

    Args:
        loss: in nats per token.
    """
    guessing = math.log(vocab_size)
    is_near = GUESSING_NATS[0] <= loss - guessing <= GUESSING_NATS[1]
    if math.isfinite(loss) and not (is_near and num_tokens >= FEW_TOKENS):
        return
    perplexity = math.exp(loss) if math.isfinite(loss) else loss
    raise ModelError(
        f"{source}: a perplexity of {perplexity:,.0f} over {num_tokens:,} tokens, where guessing among "
        f"{vocab_size:,} gives {vocab_size:,}: a broken run, not a result; the weights were most likely not "
        "loaded, or the tokenizer or the language of the text is of another model"
    )
