"""A loss that is no number, or worse than guessing: noticed, counted, traced to the micro-batch it began in.

An update with a gradient that is no number leaves nothing worth saving, so a run saves nothing while it
lasts.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from sparse_llama.data.batches import Batch
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.distributed import ranks
from sparse_llama.errors import DivergedError
from sparse_llama.training.metrics import write_json
from sparse_llama.training.moment import Moment
from sparse_llama.training.session import Session

RECORD = "diverged.json"
"""In the output folder: the texts of the micro-batch that it began in."""
_ABOVE_GUESSING = 1.0  # nats; the first steps of a large learning rate may be there for a moment


@dataclass(frozen=True)
class Onset:
    """Where it began."""

    step: int
    reason: str
    rank: int
    micro_batch: int
    """Of the rank's micro-batches of the step, from 1."""
    rows: list[int]
    """Of the training rows, by number."""

    def __str__(self) -> str:
        rows = f"row{'s' if len(self.rows) > 1 else ''} {', '.join(map(str, self.rows))}"
        rank = f" of rank {self.rank}" if ranks.world_size() > 1 else ""
        return (
            f"{self.reason}, from step {self.step} on, worst in micro-batch {self.micro_batch}{rank} ({rows})"
        )


class Divergence:
    """Looks at the loss of every step; all ranks come to the same.

    Args:
        loss_before: nats per labelled token, before training.
    """

    def __init__(self, session: Session, loss_before: float) -> None:
        # ln V is the loss of a model to which every token is as likely as any other
        guessing = math.log(session.llama.config.vocab_size)
        self.ceiling = max(guessing, loss_before) + _ABOVE_GUESSING
        self._session = session
        self.onset: Onset | None = None
        """Of the bad steps that the last step was one of; None after a good one."""
        self.num_bad = 0
        """Bad steps in a row."""

    def look(self, step: int, loss: float, grad_norm: float | None, moment: Moment) -> None:
        """Take account of a step; every rank must call it.

        Args:
            loss: nats per labelled token, over all ranks.
            grad_norm: as DeepSpeed gives it: negative where it is no number, None where it computes none.
        """
        reason = self._reason(loss, grad_norm)
        self.num_bad = 0 if reason is None else self.num_bad + 1
        if reason is None:
            self.onset = None
        elif self.onset is None:
            self.onset = self._trace(step, reason, moment)

    def check_patience(self, newest: Path | None, *, is_last: bool) -> None:
        """End the run if it has been bad for too long, or ends like that.

        Raises:
            DivergedError: naming where it began and ``newest``, the last checkpoint from before that.
        """
        patience = self._session.run.settings.training.diverged_patience
        if self.num_bad < patience and not is_last:
            return
        run, steps = self._session.run, f"{self.num_bad} step{'s' if self.num_bad > 1 else ''} in a row"
        then = f"go on from {newest} with --resume and" if newest is not None else "start again with"
        raise DivergedError(
            f"diverged for {steps}: {self.onset}, see {run.output_dir / RECORD}; {then} a lower --lr, or "
            "without these records"
        )

    def _reason(self, loss: float, grad_norm: float | None) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        is_scaled = self._session.run.precision == "fp16"  # whose overflows DeepSpeed skips, on purpose
        if not is_scaled and not self._is_finite(grad_norm):
            return "the gradient is no number"
        if loss > self.ceiling:
            return f"the loss is {loss:.2f}, worse than guessing ({self.ceiling - _ABOVE_GUESSING:.2f})"
        return None

    def _is_finite(self, grad_norm: float | None) -> bool:
        if grad_norm is not None:
            return 0 <= grad_norm < math.inf
        # at stage 0 in fp32 DeepSpeed leaves all to torch's optimizer, which steps the parameters themselves
        parts = [parameter.detach().isfinite().all() for parameter in self._session.parameters.values()]
        return bool(torch.stack(parts).all())

    def _trace(self, step: int, reason: str, moment: Moment) -> Onset:
        """Return where it began, and leave the texts there for a person to read."""
        session = self._session
        accumulation = session.run.gradient_accumulation_steps
        batches = session.batches.step(step - 1, accumulation)
        labelled = [max(batch.num_labelled, 1) for batch in batches]
        means = [float(total) / count for total, count in zip(moment.losses, labelled, strict=True)]
        heights = [mean if math.isfinite(mean) else math.inf for mean in means]
        worst = heights.index(max(heights))
        by_rank = ranks.gather_numbers(heights[worst])
        rank = by_rank.index(max(by_rank))
        micro_batch = int(ranks.gather_numbers(worst)[rank])
        group = rank // session.run.sequence_parallel_size
        rows = session.batches.row_numbers(step - 1, accumulation, group)[micro_batch]
        if ranks.rank() == rank:
            content = {"step": step, "reason": reason, "rank": rank, "micro_batch": worst + 1, "rows": rows}
            texts = documents_of(batches[worst], session.tokenizer)
            losses = [repr(mean) for mean in means]  # JSON has no NaN
            record = content | {"losses_of_micro_batches": losses, "documents": texts}
            write_json(session.run.output_dir / RECORD, record)
        ranks.barrier()
        return Onset(step, reason, rank, micro_batch + 1, rows)


def documents_of(batch: Batch, tokenizer: Tokenizer) -> list[str]:
    """Return the text of every document of a batch, or of what this rank has of it, padding included."""
    texts = list[str]()
    for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        starts = [0, *(positions == 0).nonzero().flatten().tolist(), len(ids)]
        texts += [tokenizer.decode(ids[first:end].tolist()) for first, end in pairwise(starts) if first < end]
    return texts
