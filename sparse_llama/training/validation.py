"""What a run is judged by, before and after: validation loss, exact match, sample answers."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import LlamaForCausalLM

from sparse_llama.attention.interface import AttentionPlan
from sparse_llama.config.settings import TrainingSettings
from sparse_llama.data.batches import Batch
from sparse_llama.data.records import Example
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.evaluation.exact_match import exact_match, spread
from sparse_llama.evaluation.loss import mean_token_loss
from sparse_llama.generation import generate_batch


@dataclass(frozen=True)
class Validation:
    """One look at the model: mean loss per labelled token, exact match (None when not asked for), sample
    answers."""

    loss: float
    exact_match: dict[str, Any] | None = None
    answers: list[str] = field(default_factory=list)


def validate(
    objective: nn.Module,
    llama: LlamaForCausalLM,
    plan: AttentionPlan,
    tokenizer: Tokenizer,
    batches: list[Batch],
    answerable: list[Example],
    settings: TrainingSettings,
) -> Validation:
    """Return the model's state on held-out records; every rank must call it (ZeRO-3 gathers weights in
    step). Prompts are answered by every rank on its own, also where ranks share the rows of ``batches``."""
    was_training = objective.training
    objective.eval()
    loss = mean_token_loss(objective, batches)
    scored = spread(answerable, settings.exact_match_records)
    shown = [example.prompt for example in spread(answerable, settings.samples)]
    with plan.each_rank_alone():
        matches = exact_match(llama, tokenizer, scored, settings.max_new_tokens) if scored else None
        answers = generate_batch(llama, tokenizer, shown, settings.max_new_tokens) if shown else []
    objective.train(was_training)
    return Validation(loss, matches, answers)
