"""Long context: whether a model finds a fact, by the length of the text and the fact's depth in it.

The right answer is read behind the prompt, once. Its mean loss shows degrees where a small model never
answers right; and the likeliest token at each of its places says what greedy decoding would have written:
those are its tokens, and no letter or digit follows, exactly if the greedy answer is right.

``T`` tokens of an answer, ``V`` vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sparse_llama.data.tokenizer import Tokenizer, check_vocabulary
from sparse_llama.distributed.ranks import all_reduce_sum, own_share
from sparse_llama.errors import ConfigError, DataError
from sparse_llama.evaluation.corpora import read_corpus
from sparse_llama.evaluation.evaluate import attention_of, default_window, positions_of
from sparse_llama.evaluation.haystack import KINDS, Kind, Prompt, equal_depths, make_prompts
from sparse_llama.generation import continuation, longest_sequence
from sparse_llama.model.assemble import OpenedModel
from sparse_llama.model.checks import check_logits

_SHARES_OF_WINDOW = (4, 2)  # a quarter and a half, beside all of it
_LEAST_TOKENS = 128  # of such a share: below that a text has no depth to speak of


@dataclass(frozen=True)
class Cell:
    """What came out at one length and depth."""

    length: int
    """Tokens."""
    depth: float
    """From 0, the beginning of the text, to 1."""
    num_trials: int
    exact: float
    """Share of greedy answers that are right."""
    loss: float
    """Of the right answer, in nats per token, averaged over trials."""


@dataclass(frozen=True)
class Retrieval:
    """A result and everything that it depends on."""

    model: str
    kind: Kind
    haystack: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int
    cells: tuple[Cell, ...]
    """Length by length, and within one depth by depth."""
    attention: str
    positions: str
    dtype: str
    elapsed_s: float

    @property
    def exact(self) -> float:
        """The mean over cells."""
        return sum(cell.exact for cell in self.cells) / len(self.cells)

    @property
    def loss(self) -> float:
        return sum(cell.loss for cell in self.cells) / len(self.cells)

    def by_depth(self) -> list[tuple[Cell, ...]]:
        """Return the cells of each depth, by length."""
        num_depths = len(self.depths)
        return [self.cells[place::num_depths] for place in range(num_depths)]


def retrieve(
    opened: OpenedModel,
    kind: Kind,
    *,
    data: str | None = None,
    lengths: Sequence[int] | None = None,
    num_depths: int = 5,
    trials: int = 4,
    seed: int = 42,
) -> Retrieval:
    """Measure what ``opened`` finds in ``trials`` texts of every length and depth.

    Args:
        data: text to hide the needle in, as ``read_corpus`` reads it; None is filler of our own.
        lengths: tokens of prompt and answer; None is a quarter, a half and all of ``default_window``, where
            that is long enough.

    Raises:
        SparseLlamaError: whatever is wrong with the data, a length or the model.
    """
    started_s = time.perf_counter()
    for flag, value in (("--depths", num_depths), ("--trials", trials)):
        if value < 1:
            raise ConfigError(f"{flag}: must be at least 1, got {value}")
    if kind == "pairs" and data is not None:
        raise ConfigError("--data: --retrieval pairs hides a pair among pairs; leave one of them out")
    if lengths is None:
        window = default_window(opened)
        shorter = [window // share for share in _SHARES_OF_WINDOW]
        lengths = [*(length for length in shorter if length >= _LEAST_TOKENS), window]
    longest, limit = longest_sequence(opened.model)
    if max(lengths) > longest:
        raise ConfigError(f"--lengths: {max(lengths)} tokens are more than {longest}, the {limit}")
    check_vocabulary(opened.tokenizer, opened.model.config.vocab_size)
    haystack, text = _haystack(kind, data)
    depths = equal_depths(num_depths)
    prompts = make_prompts(
        opened.tokenizer, kind, lengths=lengths, depths=depths, trials=trials, seed=seed, text=text
    )
    cells = score_prompts(opened.model, opened.tokenizer, prompts, model_name=opened.description)
    return Retrieval(
        model=opened.description,
        kind=kind,
        haystack=haystack,
        lengths=tuple(lengths),
        depths=depths,
        trials=trials,
        seed=seed,
        cells=tuple(cells),
        attention=attention_of(opened),
        positions=positions_of(opened),
        dtype=str(opened.model.dtype).removeprefix("torch."),
        elapsed_s=time.perf_counter() - started_s,
    )


def score_prompts(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, model_name: str = "the model"
) -> list[Cell]:
    """Return what came out at each length and depth of ``prompts``, which are shared out among the ranks.

    Raises:
        ModelError: constant logits.
    """
    places = list(dict.fromkeys((prompt.length, prompt.depth) for prompt in prompts))
    device = next(model.buffers()).device
    totals = torch.zeros(len(places), 3, dtype=torch.float64, device=device)  # exact, loss, trials
    for number, prompt in enumerate(own_share(list(prompts))):
        logits = _read(model, prompt)
        if number == 0:
            check_logits(logits, source=model_name)
        wanted = torch.tensor(prompt.answer_ids, device=device)
        cell = totals[places.index((prompt.length, prompt.depth))]
        cell[0] += _is_right(tokenizer, prompt, logits.argmax(-1).tolist())
        cell[1] += F.cross_entropy(logits[:-1], wanted).double()
        cell[2] += 1
    return [
        Cell(length, depth, int(count), exact / count, loss / count)
        for (length, depth), (exact, loss, count) in zip(places, all_reduce_sum(totals).tolist(), strict=True)
    ]


@torch.no_grad()
def _read(model: PreTrainedModel, prompt: Prompt) -> torch.Tensor:
    """Return the (T + 1, V) fp32 logits of the answer's tokens and of the one after them."""
    device = next(model.buffers()).device
    ids = torch.tensor([[*prompt.prompt_ids, *prompt.answer_ids]], device=device)
    logits = model(
        input_ids=ids,
        position_ids=torch.arange(ids.shape[1], device=device)[None],
        use_cache=False,
        logits_to_keep=len(prompt.answer_ids) + 1,
    ).logits[0]
    return logits.float()


def _is_right(tokenizer: Tokenizer, prompt: Prompt, likeliest: list[int]) -> bool:
    """Return whether greedy decoding writes the answer and ends it: 48213 is not the answer 4821."""
    wanted = list(prompt.answer_ids)
    following = continuation(tokenizer, wanted, likeliest[-1:])
    return likeliest[:-1] == wanted and not following[:1].isalnum()


def _haystack(kind: Kind, data: str | None) -> tuple[str, str | None]:
    """Return what the needle is hidden in, in words and as text; no text where we write it."""
    assert kind in KINDS
    if data is None:
        return ("other pairs" if kind == "pairs" else "filler of our own"), None
    corpus = read_corpus(data)
    if corpus.text is None:
        raise DataError(f"--data {data}: holds records; a haystack is text, or leave it out")
    return corpus.source, corpus.text
