"""Batches are a function of seed and step: the same rows however they are cut, every row once an epoch."""

import itertools

import pytest
import torch

from sparse_llama.config.schedule import num_optimizer_steps
from sparse_llama.data.batches import Batches, Shard, collate, count_padding, validation_batches
from sparse_llama.data.packing import Row


def make_row(ids: list[int], positions: list[int], labels: list[int]) -> Row:
    return Row(torch.tensor(ids), torch.tensor(positions), torch.tensor(labels))


def make_rows(count: int) -> list[Row]:
    """Row n is n, n, ... of its own length."""
    lengths = [2 + n % 3 for n in range(count)]
    return [
        make_row([n] * length, list(range(length)), [-100, *[n] * (length - 1)])
        for n, length in enumerate(lengths)
    ]


def rows_of_step(
    count: int, step: int, micro: int, accumulation: int, world: int, seed: int = 7
) -> list[int]:
    rows = make_rows(count)
    found = []
    for rank in range(world):
        batches = Batches(rows, micro_batch_size=micro, rank=rank, world_size=world, seed=seed)
        for batch in batches.step(step, accumulation):
            found += batch.input_ids[:, 0].tolist()
    return sorted(found)


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(1, 12, 1), (3, 2, 2), (2, 2, 3), (4, 1, 3)])
def test_a_step_has_the_same_rows_however_it_is_cut(micro: int, accumulation: int, world: int):
    for step in (0, 1, 5):
        assert rows_of_step(31, step, micro, accumulation, world) == rows_of_step(31, step, 12, 1, 1)


def test_epochs_follow_one_another_and_hold_every_row_once():
    batches = Batches(make_rows(10), micro_batch_size=4, rank=0, world_size=1, seed=0)
    order = [n for step in range(5) for n in batches.step(step, 1)[0].input_ids[:, 0].tolist()]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_another_seed_is_another_order_and_a_step_repeats():
    assert rows_of_step(31, 2, 4, 1, 1) == rows_of_step(31, 2, 4, 1, 1)
    assert rows_of_step(31, 2, 4, 1, 1) != rows_of_step(31, 2, 4, 1, 1, seed=8)


def test_the_reports_run_has_609_steps():
    """T4: 13,011 records, micro-batch 4, 16 micro-batches, 3 epochs, one record a row."""
    assert num_optimizer_steps(13_011, 64, 3) == 609


def test_shorter_rows_are_padded_with_positions_that_go_on_and_without_labels():
    short, long = (
        make_row([5, 6], [0, 1], [-100, 6]),
        make_row([7, 8, 9, 7], [0, 1, 0, 1], [-100, 8, -100, 7]),
    )
    batch = collate([short, long])
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.shift_labels.dtype == torch.int64
    assert batch.input_ids.shape == (2, 4)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch.shift_labels.tolist() == [[6, -100, -100, -100], [8, -100, 7, -100]]
    assert bool((batch.input_ids >= 0).all())
    assert batch.num_labelled == 3
    assert set(batch.to(torch.device("cpu"))) == {"input_ids", "position_ids", "shift_labels"}


@pytest.mark.parametrize(("micro", "padding"), [(1, 0), (2, 4), (3, 6), (7, 8)])
def test_padding_is_what_a_batch_adds_to_its_rows(micro: int, padding: int):
    """Lengths 2 3 4 2 3 4 2: in pairs 1 + 2 + 1, in threes 3 + 3, all together 7 x 4 - 20 = 8."""
    assert count_padding(make_rows(7), micro) == padding


@pytest.mark.parametrize(("count", "world"), [(7, 1), (7, 2), (8, 3), (1, 4)])
def test_validation_takes_every_row_once_in_as_many_batches_on_every_rank(count: int, world: int):
    shares = [
        validation_batches(make_rows(count), micro_batch_size=2, rank=rank, world_size=world)
        for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    labels = [batch.shift_labels for share in shares for batch in share]
    found = [n for table in labels for row in table.tolist() for n in [max(row)] if n != -100]
    assert sorted(found) == list(range(count))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_parts_of_rows_laid_side_by_side_are_the_rows(count: int):
    """Also where a document, or a token and its label, lie on both sides of a cut."""
    rows = [
        make_row([5, 6, 7, 8, 9], [0, 1, 2, 0, 1], [-100, 6, 7, -100, 9]),
        make_row([1, 2, 3], [0, 1, 2], [-100, 2, 3]),
    ]
    whole = collate(rows)
    parts = [collate(rows, Shard(index, count)) for index in range(count)]
    length = -(-5 // count) * count
    for name in ("input_ids", "position_ids", "shift_labels"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert joined.shape == (2, length)
        assert torch.equal(joined[:, :5], getattr(whole, name)), name
    assert {part.input_ids.shape for part in parts} == {(2, length // count)}
    assert joined[:, 5:].eq(-100).all(), "what is padded has no label"
    assert sum(part.num_labelled for part in parts) == whole.num_labelled == 5
    assert (
        torch.cat([part.position_ids for part in parts], dim=1)[0].tolist()
        == [0, 1, 2, 0, 1, 2, 3, 4][:length]
    )


@pytest.mark.parametrize(("micro", "shards", "padding"), [(1, 2, 2), (2, 2, 6), (3, 4, 8), (1, 4, 8)])
def test_padding_to_a_multiple_of_the_ranks_is_counted(micro: int, shards: int, padding: int):
    """Lengths 2 3 4 2 3 4 2, 20 tokens: one by one to even numbers, 2 more; all to 4, 8 more."""
    assert count_padding(make_rows(7), micro, shards) == padding


def test_ranks_that_share_rows_are_given_the_same_ones():
    rows = [make_row([n] * 4, list(range(4)), [-100, n, n, n]) for n in range(11)]
    read: list[int] = []
    for rank in range(2):
        first, second = (
            Batches(rows, micro_batch_size=2, rank=rank, world_size=2, seed=7, shard=Shard(index, 2))
            for index in range(2)
        )
        for left, right in zip(first.step(1, 3), second.step(1, 3), strict=True):
            assert torch.equal(left.input_ids, right.input_ids)
            assert left.position_ids.tolist() == [[0, 1], [0, 1]]
            assert right.position_ids.tolist() == [[2, 3], [2, 3]]
            read += left.input_ids[:, 0].tolist()
    assert sorted(read) == rows_of_step(11, 1, 2, 3, 2)


def test_every_rank_has_as_many_parts_to_validate_on():
    """ZeRO-3 gathers weights in step, and the ranks of a group exchange heads in step."""
    shares = [
        validation_batches(make_rows(7), micro_batch_size=2, rank=rank, world_size=3, shard=Shard(index, 2))
        for rank in range(3)
        for index in range(2)
    ]
    assert {len(share) for share in shares} == {2}
    labelled = sum(batch.num_labelled for share in shares for batch in share)
    assert labelled == sum(len(row) - 1 for row in make_rows(7))


def lengths_of_step(micro: int, accumulation: int, world: int, *, is_grouped: bool) -> list[list[int]]:
    """Return the numbers of the rows in every micro-batch of a step, all ranks'."""
    found = []
    for rank in range(world):
        batches = Batches(
            make_rows(31),
            micro_batch_size=micro,
            rank=rank,
            world_size=world,
            seed=7,
            group_by_length=is_grouped,
        )
        found += [batch.input_ids[:, 0].tolist() for batch in batches.step(4, accumulation)]
    return found


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(1, 12, 1), (3, 2, 2), (2, 2, 3), (4, 1, 3)])
def test_grouping_changes_which_rows_share_a_micro_batch_and_not_which_share_a_step(
    micro: int, accumulation: int, world: int
):
    """Step 4 of 12 rows, 48 to 59 of the epochs laid end to end, lies wholly in the second one of 31."""
    drawn, grouped = (
        lengths_of_step(micro, accumulation, world, is_grouped=is_grouped) for is_grouped in (False, True)
    )
    assert sorted(itertools.chain(*grouped)) == sorted(itertools.chain(*drawn))
    assert lengths_of_step(micro, accumulation, world, is_grouped=True) == grouped
    spans = [sorted(2 + n % 3 for n in batch) for batch in grouped]
    assert all(one[0] >= other[-1] or other[0] >= one[-1] for one in spans for other in spans if one != other)


def test_grouped_epochs_hold_every_row_once():
    batches = Batches(make_rows(12), micro_batch_size=2, rank=0, world_size=1, seed=0, group_by_length=True)
    order = [
        n for step in range(4) for batch in batches.step(step, 3) for n in batch.input_ids[:, 0].tolist()
    ]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))


def test_what_grouping_saves_is_what_the_micro_batches_of_an_epoch_are_shorter_by():
    rows = make_rows(12)
    drawn, grouped = (
        Batches(rows, micro_batch_size=2, rank=0, world_size=1, seed=0, group_by_length=is_grouped)
        for is_grouped in (False, True)
    )
    held = [
        sum(batch.input_ids.numel() for step in range(2) for batch in batches.step(step, 3))
        for batches in (drawn, grouped)
    ]
    assert held[1] < held[0]
    assert drawn.count_padding(3) == grouped.count_padding(3, as_drawn=True) == held[0] - sum(map(len, rows))
    assert grouped.count_padding(3) == held[1] - sum(map(len, rows))
