"""The demo's base: a small LLaMA, and the loop that trains it on the corpus in 80 minutes on one core."""

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.demo.corpus import Stage, documents, text_of
from sparse_llama.demo.frames import FRAME, Span
from sparse_llama.demo.world import World


@dataclass(frozen=True)
class BaseRun:
    """How the base is trained. The defaults made the bundled one."""

    num_steps: int = 7_500
    warm_up_documents: int = 300
    """Steps at the start with the corpus' warm-up documents only."""

    late_documents: int = 2_000
    """Steps at the end with the corpus' late documents."""

    num_rows: int = 16
    row_length: int = 256
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    warmup_steps: int = 100
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = 500
    end_weight: float = 0.3
    """Weight of the end of a document in the loss; an answer's tokens have weight 1."""


def base_config(vocab_size: int) -> LlamaConfig:
    """Return the shape of the base."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        # Tied while it learns, so that copying a word is one skill and not one per word: facts were found in
        # a text after 800 steps, untied not at all. Saved as two matrices, as LLaMA's are.
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        architectures=["LlamaForCausalLM"],
    )


def train_base(
    world: World,
    tokenizer: sentencepiece.SentencePieceProcessor,
    run: BaseRun,
    state_path: Path,
    report: Callable[[str], None] = print,
) -> LlamaForCausalLM:
    """Return the trained base; continues from ``state_path`` where that exists, and saves there regularly."""
    torch.manual_seed(run.seed)
    model = LlamaForCausalLM(base_config(tokenizer.vocab_size()))
    optimizers = _optimizers(model, run)
    first = _load_state(state_path, model, optimizers, run) if state_path.exists() else 0
    start = time.perf_counter()
    for step in range(first, run.num_steps):
        _set_lr(optimizers, _schedule(step, run))
        loss = _weighted_loss(model, batch(world, tokenizer, run, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step + 1 == run.num_steps:
            report(f"step {step}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s")
        if (step + 1) % run.save_every == 0 or step + 1 == run.num_steps:
            _save_state(state_path, model, optimizers, run, step + 1)
    return model


@dataclass(frozen=True)
class Batch:
    """Rows of whole documents, (rows, row_length) each."""

    ids: Tensor
    weights: Tensor
    """Of each token in the loss; 0 in the empty rest of a row."""

    owners: Tensor
    """Which of its row's documents a token belongs to; -1 in the rest."""


def batch(world: World, tokenizer: sentencepiece.SentencePieceProcessor, run: BaseRun, step: int) -> Batch:
    """Return the rows of step ``step``, the same ones for the same step.

    Documents are never cut, or answers would stand without their questions: a row's rest stays empty.
    """
    stream = documents(world, run.seed + 1_000_003 * (step + 1), _stage(step, run))
    rows: list[list[tuple[int, float, int]]] = [[] for _ in range(run.num_rows)]
    for owner, document in enumerate(stream):
        ids, weights = encode_document(document, tokenizer, run.end_weight)
        free = [row for row in rows if len(row) + len(ids) <= run.row_length]
        if not free:
            break
        free[0] += [(token, weight, owner) for token, weight in zip(ids, weights, strict=True)]
    full = [row + [(0, 0.0, -1)] * (run.row_length - len(row)) for row in rows]
    ids, weights, owners = (
        torch.tensor([[token[part] for token in row] for row in full]) for part in range(3)
    )
    return Batch(ids=ids, weights=weights, owners=owners)


def _stage(step: int, run: BaseRun) -> Stage:
    if step < run.warm_up_documents:
        return "warm_up"
    return "late" if step >= run.num_steps - run.late_documents else "main"


def encode_document(
    document: list[Span], tokenizer: sentencepiece.SentencePieceProcessor, end_weight: float
) -> tuple[list[int], list[float]]:
    """Return a document's ids, with begin and end, and the weight of each in the loss."""
    text = text_of(document)
    ends = list(itertools.accumulate(len(span.text) for span in document))
    weights, current = [0.0], 0
    position = -1  # SentencePiece puts a space in front of the text
    for piece in tokenizer.encode(text, out_type=str):
        position += len(piece)
        # A piece belongs to the span of its last character: the space before an answer is in its first piece.
        while position > ends[current]:
            current += 1
        weights.append(document[current].weight)
    ids = [1, *tokenizer.encode(text)]
    return [*ids, 2], [*weights, end_weight if weights[-1] > FRAME else FRAME]


def _weighted_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    # A token sees its own document only, as it will when it is asked.
    owners = batch.owners[:, :-1]
    mask = (owners[:, None, :, None] == owners[:, None, None, :]).tril()
    # bf16 products halve a step's time on cores that have them; weights and optimizer state stay fp32.
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch.ids[:, :-1], attention_mask=mask, use_cache=False).logits
    wanted, importance = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none")
    return (losses * importance).sum() / importance.sum()


def _optimizers(model: LlamaForCausalLM, run: BaseRun) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the rest: embedding, head, norms."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if "_proj." in name]
    others = [parameter for name, parameter in named if "_proj." not in name]
    return (
        torch.optim.Muon(matrices, lr=run.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=run.adam_lr, betas=(0.9, 0.95), weight_decay=0.01),
    )


def _schedule(step: int, run: BaseRun) -> float:
    """Return the factor on the learning rates.

    A short warm-up, level for a third, then down to zero; for the late documents once more from a third of
    the peak down to zero.
    """
    main_steps = run.num_steps - run.late_documents
    if step < main_steps:
        return min(1.0, (step + 1) / run.warmup_steps) * min(1.0, 1.5 * (1 - step / main_steps))
    late = step - main_steps
    return min(1.0, (late + 1) / run.warmup_steps) * 0.35 * (1 - late / run.late_documents)


def _set_lr(optimizers: tuple[torch.optim.Optimizer, ...], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group.get("initial_lr", group["lr"])
            group["lr"] = factor * group["initial_lr"]


def _save_state(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: tuple[torch.optim.Optimizer, ...],
    run: BaseRun,
    next_step: int,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "run": asdict(run),
        "next_step": next_step,
    }
    # Renamed when complete: whoever is stopped while saving keeps the state before.
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def _load_state(
    path: Path, model: LlamaForCausalLM, optimizers: tuple[torch.optim.Optimizer, ...], run: BaseRun
) -> int:
    """Return the step to continue with, after restoring model and optimizers."""
    state = torch.load(path, weights_only=True)
    if state["run"] != asdict(run):
        raise ValueError(
            f"{path} is of another run, {state['run']}; wanted {asdict(run)}; remove it or go on with it"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["next_step"])
