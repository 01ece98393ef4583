"""Batches as a function of the step: nothing to remember, so a resumed run takes up where it was killed.

``B`` rows of a micro-batch, ``T`` tokens. Where R ranks share each row, a batch is one rank's T / R of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F

from sparse_llama.data.packing import IGNORED, PADDING, Row

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Which of how many equal parts of each row a rank holds."""

    index: int = 0
    count: int = 1


WHOLE = Shard()


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch, or a rank's part of it; (B, T) int64 each."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    """0 where a document starts."""
    shift_labels: torch.Tensor
    """What each token predicts: the label of the next one; -100 is nothing. Shifted before a row is cut among
    ranks, whose last token predicts the first of the next rank."""

    @property
    def num_labelled(self) -> int:
        """Tokens that are predicted: the first of a row cannot be."""
        return int((self.shift_labels != IGNORED).sum())

    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids, positions and labels."""
        return self.input_ids, self.position_ids, self.shift_labels

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the tensors by the names of the model's arguments."""
        return {
            "input_ids": self.input_ids.to(device, non_blocking=True),
            "position_ids": self.position_ids.to(device, non_blocking=True),
            "shift_labels": self.shift_labels.to(device, non_blocking=True),
        }


class Batches:
    """The training rows, in an order that is drawn anew every epoch, shared out among ranks.

    Args:
        rank, world_size: of those that read different rows: with sequence parallelism, the groups.
        group_by_length: cut a step into micro-batches by the lengths of its rows, the longest first.
    """

    def __init__(
        self,
        rows: list[Row],
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shard: Shard = WHOLE,
        group_by_length: bool = False,
    ) -> None:
        assert len(rows) > 0
        self._shard, self._is_grouped = shard, group_by_length
        self._rows, self._micro, self._rank, self._world = rows, micro_batch_size, rank, world_size
        self._seed = seed
        self._epoch_order = lru_cache(maxsize=2)(self._draw_order)  # a step may reach into the next epoch

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def count_padding(self, accumulation: int, *, as_drawn: bool = False) -> int:
        """Return the tokens that the micro-batches of the first epoch add to its rows, over all ranks.

        Args:
            as_drawn: what it would be with ``group_by_length`` off.
        """
        order = self._epoch_order(0)
        steps = _cut([self._rows[index] for index in order], self._micro * accumulation * self._world)
        if self._is_grouped and not as_drawn:
            steps = [by_length(rows) for rows in steps]
        return sum(count_padding(rows, self._micro, self._shard.count) for rows in steps)

    def step(self, step_index: int, accumulation: int) -> list[Batch]:
        """Return this rank's micro-batches of an optimizer step, counted from 0.

        All ranks' together are rows [step G, step G + G) of the epochs laid end to end, G rows a step: the
        same rows however G is cut into micro-batches and ranks, grouped by length or not:
        grouping sorts the G rows, and an optimizer step weighs every labelled token of its rows the same.
        """
        numbers = self.row_numbers(step_index, accumulation, self._rank)
        return [collate([self._rows[number] for number in piece], self._shard) for piece in numbers]

    def sample(self, count: int = 256) -> dict[str, torch.Tensor]:
        """Return the tokens of up to ``count`` rows, evenly spaced, and the lengths of all: what tells one
        data set from another at little cost."""
        chosen = range(0, len(self._rows), -(-len(self._rows) // count))
        parts = {"lengths": torch.tensor([len(row) for row in self._rows], dtype=torch.int32)}
        for number in chosen:
            row = self._rows[number]
            parts |= {f"ids {number}": row.ids, f"labels {number}": row.labels}
        return parts

    def row_numbers(self, step_index: int, accumulation: int, rank: int) -> list[list[int]]:
        """Return the numbers of the rows in each micro-batch of ``rank`` in a step, counted from 0."""
        num_rows = self._micro * accumulation * self._world
        numbers = list(map(self._number, range(step_index * num_rows, (step_index + 1) * num_rows)))
        if self._is_grouped:
            numbers.sort(key=lambda number: len(self._rows[number]), reverse=True)
        return [list(piece) for piece in _cut(numbers, self._micro)[rank :: self._world]]

    def _number(self, place: int) -> int:
        epoch, index = divmod(place, len(self._rows))
        return self._epoch_order(epoch)[index]

    def _draw_order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 % 2**62 + epoch)
        return torch.randperm(len(self._rows), generator=generator).tolist()


def validation_batches(
    rows: list[Row], *, micro_batch_size: int, rank: int, world_size: int, shard: Shard = WHOLE
) -> list[Batch]:
    """Return this rank's share of ``rows`` in order: every row once over all ranks.

    Every rank has as many batches as the others, as ZeRO-3 gathers weights in step: a rank that has run out
    gets a row without labels.
    """
    pieces = _cut(rows, micro_batch_size)
    pieces += [[_unlabelled(rows[-1])]] * (-len(pieces) % world_size)
    return [collate(piece, shard) for piece in pieces[rank::world_size]]


def by_length(rows: Sequence[Row]) -> list[Row]:
    """Return ``rows`` from the longest to the shortest: memory that is short is so in the first micro-batch.

    Rows of equal length keep their order.
    """
    return sorted(rows, key=len, reverse=True)


def count_padding(rows: Sequence[Row], micro_batch_size: int, num_shards: int = 1) -> int:
    """Return the tokens that ``collate`` adds to ``rows``, taken in this order, over all shards."""
    padded = (len(piece) * _padded_length(piece, num_shards) for piece in _cut(rows, micro_batch_size))
    return sum(padded) - sum(map(len, rows))


def collate(rows: Sequence[Row], shard: Shard = WHOLE) -> Batch:
    """Return rows as one batch, or a part of its tokens; short ones are padded at their ends by more
    positions of their last document: attention is causal, so what stands after a document changes nothing in
    it.
    """
    longest = _padded_length(rows, shard.count)
    ids = [F.pad(row.ids, (0, longest - len(row)), value=PADDING) for row in rows]
    shifted = [F.pad(row.labels[1:], (0, longest - len(row) + 1), value=IGNORED) for row in rows]
    positions = [
        torch.cat([row.positions, row.positions[-1] + torch.arange(1, 1 + longest - len(row))])
        for row in rows
    ]
    num_own = longest // shard.count
    own = slice(shard.index * num_own, (shard.index + 1) * num_own)
    return Batch(*(torch.stack(table)[:, own].long().contiguous() for table in (ids, positions, shifted)))


def _padded_length(rows: Sequence[Row], num_shards: int) -> int:
    longest = max(map(len, rows))
    return longest + -longest % num_shards


def _cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _unlabelled(row: Row) -> Row:
    return Row(row.ids, row.positions, torch.full_like(row.labels, IGNORED))
