"""Perplexity of text under a sliding window, and of responses given their prompts.

Text is one sequence with the beginning of sequence in front of it once, as transformers' tokenizers put it,
or a sequence for each document where lm-evaluation-harness is followed; ``windows.py`` draws how both are
cut. A window is a sequence of its own: its first token has position 0 and stands at the start of a sparse
layout.

Losses are cross entropies of fp32 logits in nats, summed in fp64. ``T`` tokens, ``V`` vocabulary, ``L`` the
longest window.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sparse_llama.data.packing import IGNORED
from sparse_llama.distributed.ranks import all_reduce_sum, own_share
from sparse_llama.errors import ConfigError, DataError
from sparse_llama.evaluation.score import Score
from sparse_llama.evaluation.windows import cut_as_harness, cut_windows
from sparse_llama.generation import longest_sequence
from sparse_llama.model.checks import check_logits

Read = tuple[torch.Tensor, torch.Tensor]
"""Ids that are read, and the targets that the last of them predict."""


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
    pairs = [
        (tokens[part.first : part.last], tokens[part.last + 1 - part.num_scored : part.last + 1])
        for part in cut_windows(len(ids), window=window, stride=stride)
    ]
    return _score(model, pairs, model_name)


def score_documents(
    model: PreTrainedModel,
    documents: Iterable[list[int]],
    *,
    prefix: int,
    window: int,
    source: str,
    model_name: str = "the model",
) -> Score:
    """Return the loss of every token of every document: lm-evaluation-harness's ``loglikelihood_rolling``,
    summed and negated, over windows shared out among the ranks.

    Args:
        documents: ids without a beginning of sequence.
        prefix: the token before each document's first: the beginning of sequence, or the end of one where
            there is none.

    Raises:
        ConfigError: a window longer than the model's longest sequence.
        DataError: no document has a token.
        ModelError: constant logits.
    """
    check_windows(model, window, window)
    sequences = [torch.tensor([prefix, *ids]) for ids in documents]
    pairs = [
        (tokens[part.first : part.last], tokens[part.last + 1 - part.num_scored : part.last + 1])
        for tokens in sequences
        for part in cut_as_harness(len(tokens), window=window)
    ]
    if not pairs:
        raise DataError(f"{source}: 0 tokens; a perplexity needs at least 1")
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
    pairs: list[Read] = []
    for ids, labels in rows:
        targets = torch.tensor(labels[1:])
        labelled = (targets != IGNORED).nonzero()
        if len(labelled):
            pairs.append((torch.tensor(ids[:-1]), targets[int(labelled[0]) :]))
    if not pairs:
        raise DataError(f"{source}: no response has a token to score; give records with responses")
    return _score(model, pairs, model_name)


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
def _score(model: PreTrainedModel, pairs: list[Read], model_name: str) -> Score:
    """Return the loss of the targets, over ``pairs`` shared out among the ranks."""
    device = next(model.buffers()).device
    longest = max(len(read) for read, _ in pairs)
    # sums and counts in one tensor, one message; counts are exact in fp64 up to 2 ** 53
    totals = torch.zeros(2, longest + 1, dtype=torch.float64, device=device)  # (2, L + 1)
    for number, (read, targets) in enumerate(own_share(pairs)):
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
        positions = slice(len(read) + 1 - len(targets), len(read) + 1)
        totals[0, positions] += losses.double()
        totals[1, positions] += (targets != IGNORED).to(device)
    loss_sums, counts = all_reduce_sum(totals).tolist()
    return Score(tuple(loss_sums), tuple(map(int, counts)))
