"""Answers of a model: greedy for many prompts, greedy or sampled for one, as it is written.

A prompt is read at once and then one token at a time, over cached keys and values. Sequences start at
position 0, and with them the blocks of a sparse layout, so nothing is ever padded on the left: prompts of
equal length share a batch, and the others get one of their own.

``B`` prompts, ``T`` tokens, ``V`` vocabulary.
"""

import inspect
import math
from collections.abc import Iterator
from itertools import groupby

import torch
from transformers import DynamicCache, PreTrainedModel

from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.distributed.ranks import broadcast_from_main
from sparse_llama.errors import ConfigError, ModelError

MAX_ROWS = 16
"""Prompts of a batch: at 7B each token of each costs 512 KiB of cached keys and values in bf16."""
_UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character


def generate_batch(
    llama: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Return the greedy continuation of every prompt, without the end of sequence, nothing stripped.

    Works inside DeepSpeed at every ZeRO stage. Every rank must call it with the same prompts and gets the
    same answers: each token is rank 0's choice, as ranks that differ in the last bit of a logit would take
    different numbers of steps, and those of ZeRO-3 wait for one another. A continuation also ends where the
    longest sequence of the model does.

    Raises:
        ModelError: a prompt leaves no room for a token.
    """
    sequences = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    stops = _stop_ids(llama, tokenizer)
    answers = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(sequences[index]))
    for length, group in groupby(by_length, key=lambda index: len(sequences[index])):
        num_steps = min(max_new_tokens, room_after(llama, length))
        same_length = list(group)
        for first in range(0, len(same_length), MAX_ROWS):
            chunk = same_length[first : first + MAX_ROWS]
            rows = _continue_greedily(llama, [sequences[index] for index in chunk], num_steps, stops)
            for index, row in zip(chunk, rows, strict=True):
                answers[index] = continuation(tokenizer, sequences[index], row)
    return answers


def generate_stream(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 42,
) -> Iterator[str]:
    """Return the pieces of one prompt's continuation as they come; joined they are the whole text.

    A piece ends where a character does, never inside one.

    Args:
        temperature: 0 takes the likeliest token; everything above draws one.
        top_p: draws from the likeliest tokens that together have this probability; 1 is off.
        top_k: draws from this many likeliest tokens, before ``top_p``; 0 is off.
        seed: of the draws, which are made on the CPU: the same on every device for the same logits.

    Raises:
        ConfigError: a value is out of range, or would have no effect.
        ModelError: prompt and ``max_new_tokens`` are longer than the model's longest sequence.
    """
    return stream_after(
        model,
        tokenizer,
        encode_prompt(tokenizer, prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )


def stream_after(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 42,
) -> Iterator[str]:
    """Return the pieces of what follows ``prompt_ids``; else as ``generate_stream``."""
    check_sampling(max_new_tokens, temperature, top_p, top_k)
    room = room_after(model, len(prompt_ids))
    if max_new_tokens > room:
        raise ModelError(
            f"--max_new_tokens: {max_new_tokens} after a prompt of {len(prompt_ids)} tokens are more than "
            f"{' = the '.join(map(str, longest_sequence(model)))}; use at most {room}"
        )
    choose = _Choice(temperature, top_p, top_k, seed)
    return _stream(model, tokenizer, prompt_ids, max_new_tokens, choose)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids that a model is given: the beginning of sequence and the prompt, as in training.

    Raises:
        ConfigError: there is nothing to give: an empty prompt, and a tokenizer that marks no beginning.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = bos + (tokenizer.encode(prompt) if prompt else [])
    if not ids:
        raise ConfigError("--prompt: empty, and this tokenizer has no beginning of sequence to go on from")
    return ids


def continuation(tokenizer: Tokenizer, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Return the text that ``new_ids`` add: a decoder drops the space before a first word, and only there."""
    return tokenizer.decode(prompt_ids + new_ids)[len(tokenizer.decode(prompt_ids)) :]


def longest_sequence(model: PreTrainedModel) -> tuple[int, str]:
    """Return how many tokens the model can attend over, and the name of what limits it.

    Beyond ``max_position_embeddings`` a LLaMA has seen no rotation and answers nonsense without an error; an
    adapter's ``rope_parameters`` have moved it to where its run went. A sparse layout ends with its master.
    """
    limits = [(int(model.config.max_position_embeddings), "max_position_embeddings of the model")]
    for module in model.modules():
        plan = getattr(module, "attention_plan", None)
        longest = None if plan is None else plan.max_tokens()
        if longest is not None:
            limits.append((longest, "master_length of the sparse layout"))
            break  # all layers have the same plan
    for sizes in getattr(model.config, "layouts", ()):  # an export carries its layouts itself
        limits.append((sizes["block"] * sizes["num_blocks"], "length of the export's sparse layout"))
    return min(limits)


def room_after(model: PreTrainedModel, num_prompt_tokens: int) -> int:
    """Return how many tokens can follow a prompt.

    Raises:
        ModelError: none.
    """
    longest, limit = longest_sequence(model)
    if num_prompt_tokens >= longest:
        raise ModelError(
            f"the prompt: {num_prompt_tokens} tokens leave no room to answer in {longest}, the {limit}; "
            f"shorten it to at most {longest - 1} tokens"
        )
    return longest - num_prompt_tokens


def next_token_probabilities(
    logits: torch.Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> torch.Tensor:
    """Return the (V,) fp64 distribution that a token is drawn from, on the CPU.

    Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751, section 3.1) after top-k. Ties go to the lower
    id, so that exactly ``top_k`` tokens are left.
    """
    scores = logits.double().cpu() / temperature  # (V,)
    probabilities, order = scores.softmax(-1).sort(descending=True, stable=True)
    if top_k:
        probabilities[top_k:] = 0.0
        probabilities /= probabilities.sum()
    before = probabilities.cumsum(0) - probabilities  # of all tokens that are likelier
    if top_p < 1.0:
        is_dropped = before >= top_p
        is_dropped[0] = False
        probabilities[is_dropped] = 0.0
        probabilities /= probabilities.sum()
    return torch.zeros_like(scores).scatter(0, order, probabilities)


class _Reader:
    """A model and the keys and values of what it has read so far."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        # transformers renamed the argument in 5.24
        takes_cache = "cache" in inspect.signature(model.forward).parameters
        self._cache_name = "cache" if takes_cache else "past_key_values"
        self._num_read = 0
        # a buffer's, not a parameter's: under ZeRO-3 those may wait anywhere
        self._device = next(model.buffers()).device

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the (B, V) logits of the token that follows ``ids`` (B, T) and everything read before."""
        end = self._num_read + ids.shape[1]
        output = self._model(
            input_ids=ids.to(self._device),
            position_ids=torch.arange(self._num_read, end, device=self._device)[None],  # (1, T)
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: self._cache},
        )
        self._num_read = end
        return output.logits[:, -1]


class _Choice:
    """How the next token of one sequence is chosen."""

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int) -> None:
        self._sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        self._generator = None if temperature == 0 else torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """Return the token that follows, given its (V,) logits."""
        if self._generator is None:
            return int(logits.argmax())
        probabilities = next_token_probabilities(logits, **self._sampling)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


class TextStream:
    """The text of a growing sequence, given out in pieces of whole characters.

    Each piece is decoded behind the piece before it, not alone, which would lose its leading space, and not
    behind everything, which would cost a quadratic time.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._first, self._last = 0, len(prompt_ids)  # of the piece before

    def add(self, token: int) -> str:
        """Return what can be read now, which is nothing inside a character."""
        self._ids.append(token)
        piece = self._unread()
        if piece.endswith(_UNFINISHED):
            return ""
        if piece:
            self._first, self._last = self._last, len(self._ids)
        return piece

    def finish(self) -> str:
        """Return what is left: a character that was never finished."""
        return self._unread() if self._last < len(self._ids) else ""

    def _unread(self) -> str:
        before = self._ids[self._first : self._last]
        return continuation(self._tokenizer, before, self._ids[self._last :])


def _stream(
    model: PreTrainedModel, tokenizer: Tokenizer, prompt_ids: list[int], max_new_tokens: int, choose: _Choice
) -> Iterator[str]:
    reader, text, stops = _Reader(model), TextStream(tokenizer, prompt_ids), _stop_ids(model, tokenizer)
    unread = torch.tensor([prompt_ids])  # (1, T)
    for _ in range(max_new_tokens):
        token = choose(reader.read(unread)[0])
        if token in stops:
            break
        if piece := text.add(token):
            yield piece
        unread = torch.tensor([[token]])
    if piece := text.finish():
        yield piece


def _continue_greedily(
    model: PreTrainedModel, sequences: list[list[int]], num_steps: int, stops: set[int]
) -> list[list[int]]:
    """Return the new ids of sequences of equal length, up to the token that ends each."""
    reader = _Reader(model)
    rows: list[list[int]] = [[] for _ in sequences]
    is_open = [True] * len(sequences)
    unread = torch.tensor(sequences)  # (B, T)
    for _ in range(num_steps):
        chosen = broadcast_from_main(reader.read(unread).argmax(-1))  # (B,)
        for index, token in enumerate(chosen.tolist()):
            is_open[index] = is_open[index] and token not in stops
            if is_open[index]:
                rows[index].append(token)
        if not any(is_open):
            break
        unread = chosen[:, None]  # rows that have ended are read on and ignored
    return rows


def _stop_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> set[int]:
    """Return the ids that end an answer; instruction-tuned bases name several."""
    named = model.config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return {tokenizer.eos_id, *(token for token in named if token is not None)}


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    """Raise ConfigError if a value is out of range, or would have no effect."""
    if max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens: must be at least 1, got {max_new_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"--temperature: must be 0 (the likeliest token) or above, got {temperature}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top_p: must be above 0 and at most 1, got {top_p}")
    if top_k < 0:
        raise ConfigError(f"--top_k: must be 0 (off) or above, got {top_k}")
    if temperature == 0 and (top_p < 1 or top_k > 0):
        flag = "--top_p" if top_p < 1 else "--top_k"
        raise ConfigError(
            f"{flag}: has no effect at --temperature 0, which takes the likeliest token; give a temperature"
        )
