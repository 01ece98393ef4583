"""Perplexity of text under a sliding window, and of responses given their prompts.

Text is one sequence of n tokens, with the beginning of sequence in front of it once, as transformers'
tokenizers put it. Window k reads the W tokens from k S on and predicts the token after each; of windows but
the first, the first W - S predictions are context only, because the window before has made them. So every
token but the first is scored exactly once, with at least W - S tokens before it:

    W = 4, S = 2      reads 0 1 2 3      scores 1 2 3 4
                      reads 2 3 4 5      scores 5 6
                      reads 4 5 6        scores 7              (n = 8)

S = W is the usual measure of published perplexities, a smaller S a better and slower one. A window is a
sequence of its own: its first token has position 0 and stands at the start of a sparse layout.

Losses are cross entropies of fp32 logits in nats, summed in fp64. ``T`` tokens, ``V`` vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sparse_llama.data.packing import IGNORED
from sparse_llama.distributed.ranks import all_reduce_sum, own_share
from sparse_llama.errors import ConfigError, DataError
from sparse_llama.generation import longest_sequence
from sparse_llama.model.checks import check_logits

_LARGEST_EXPONENT = 709.0  # exp(710) is more than an fp64 can hold


@dataclass(frozen=True)
class Score:
    """A loss summed over ``num_tokens`` predicted tokens."""

    loss_sum: float
    num_tokens: int

    @property
    def nll_per_token(self) -> float:
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        mean = self.nll_per_token
        return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf


@dataclass(frozen=True)
class Window:
    """Tokens [first, last) are read; of the predictions they make, the last ``num_scored`` count."""

    first: int
    last: int
    num_scored: int


def cut_windows(num_tokens: int, *, window: int, stride: int) -> list[Window]:
    """Return the windows over ``num_tokens``; the last one may be shorter."""
    assert 1 <= stride <= window
    windows: list[Window] = []
    num_predictions, scored = num_tokens - 1, 0  # the last token is predicted and never read
    while scored < num_predictions:
        first = len(windows) * stride
        last = min(first + window, num_predictions)
        windows.append(Window(first, last, last - scored))
        scored = last
    return windows


def score_text(
    model: PreTrainedModel,
    ids: list[int],
    *,
    window: int,
    stride: int,
    source: str,
    model_name: str = "the model",
) -> Score:
    """Return the loss of every token of ``ids`` but the first, over windows shared out among the ranks.

    Args:
        source, model_name: of the text and the model, for messages.

    Raises:
        ConfigError: no such window or stride, or a window longer than the model's longest sequence.
        DataError: fewer than two tokens.
        ModelError: constant logits, the sign of weights that were never loaded.
    """
    check_windows(model, window, stride)
    if len(ids) < 2:
        raise DataError(f"{source}: {len(ids)} tokens; a perplexity needs at least 2")
    tokens = torch.tensor(ids)
    pairs = (
        (tokens[part.first : part.last], tokens[part.last + 1 - part.num_scored : part.last + 1])
        for part in own_share(cut_windows(len(ids), window=window, stride=stride))
    )
    return _score(model, pairs, model_name)


def score_responses(
    model: PreTrainedModel,
    rows: list[tuple[list[int], list[int]]],
    *,
    source: str,
    model_name: str = "the model",
) -> Score:
    """Return the loss of every labelled token, over rows shared out among the ranks.

    Args:
        rows: ids and labels of one record each, equally long; labels are not shifted, -100 is not scored.

    Raises:
        DataError: no token is labelled.
        ModelError: constant logits.
    """
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for ids, labels in rows:
        targets = torch.tensor(labels[1:])
        labelled = (targets != IGNORED).nonzero()
        if len(labelled):
            pairs.append((torch.tensor(ids[:-1]), targets[int(labelled[0]) :]))
    if not pairs:
        raise DataError(f"{source}: no response has a token to score; give records with responses")
    return _score(model, own_share(pairs), model_name)


def check_windows(model: PreTrainedModel, window: int, stride: int) -> None:
    """Raise ConfigError unless the model can read a ``window`` and ``stride`` leaves no token out."""
    longest, limit = longest_sequence(model)
    if not 1 <= window <= longest:
        raise ConfigError(f"--window: must be from 1 to {longest}, the {limit}, got {window}")
    if not 1 <= stride <= window:
        raise ConfigError(
            f"--stride: must be from 1 to the window ({window}), or tokens between windows are left out, "
            f"got {stride}"
        )


@torch.no_grad()
def _score(
    model: PreTrainedModel, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], model_name: str
) -> Score:
    """Return the loss of the targets, each set of them predicted by the last tokens that are read with it."""
    device = next(model.buffers()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for number, (read, targets) in enumerate(pairs):
        logits = model(
            input_ids=read[None].to(device),
            position_ids=torch.arange(len(read), device=device)[None],
            use_cache=False,
            logits_to_keep=len(targets),  # V x 6 bytes each, which context does not need
        ).logits[0]
        if number == 0:
            check_logits(logits, source=model_name)
        losses = F.cross_entropy(
            logits.float(), targets.to(device), ignore_index=IGNORED, reduction="none"
        )  # (T,)
        total[0] += losses.double().sum()
        total[1] += (targets != IGNORED).sum()
    loss_sum, num_tokens = all_reduce_sum(total).tolist()
    return Score(loss_sum, int(num_tokens))
