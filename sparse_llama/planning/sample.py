"""Which few layers of a model stand for all of them.

Kept are the lowest and the highest layers, where a step begins and turns, and one group in between of every
kind: with or without a prompt, with v2's parts or without, of each layout, and at each place in a group of
nested checkpoints. Contiguous kinds stay contiguous, so that the settings of the whole describe the few.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.memory.checkpointing import inputs_every

_AT_EACH_END = 2  # groups: the offload engine fetches one input ahead


@dataclass(frozen=True)
class Sample:
    """The layers that are run."""

    layers: tuple[int, ...]
    """Their numbers in the whole model."""
    traced_of: tuple[int, ...]
    """For every layer of the whole model, the position in ``layers`` of the one that it is like."""
    adapter: AdapterSettings
    checkpointing: ActivationCheckpointing | None
    """Settings that make of the few what the whole's make of all."""


def choose_layers(
    adapter: AdapterSettings,
    checkpointing: ActivationCheckpointing | None,
    layouts: Sequence[Hashable],
) -> Sample:
    """Return the sample of a model whose layers attend by ``layouts``."""
    num_layers = len(layouts)
    prompted, adapted = adapter.prompt_layers(num_layers), adapter.adapted_layers(num_layers)
    kinds = [(index in prompted, index in adapted, layouts[index]) for index in range(num_layers)]
    first = adapted.start
    every = 1 if checkpointing is None else inputs_every(num_layers - first, checkpointing.number_checkpoints)
    groups = [(index,) for index in range(first)]
    groups += [tuple(range(i, min(i + every, num_layers))) for i in range(first, num_layers, every)]
    names: list[Hashable] = [tuple(kinds[index] for index in group) for group in groups]
    ends = _groups_at_end(num_layers - first, every)
    kept, inner = _kept_groups(names, num_frozen=first, at_end=ends)
    position_of: dict[int, int] = {}
    for group in kept:
        for index in groups[group]:
            position_of[index] = len(position_of)
    traced_of: list[int] = []
    for number in range(len(groups)):
        stands_in = number if number in kept else inner[number < first, names[number]]
        traced_of += [position_of[index] for index in groups[stands_in]]
    layers = tuple(position_of)
    return Sample(
        layers,
        tuple(traced_of),
        _shorter_adapter(adapter, layers, prompted),
        _shorter_checkpointing(checkpointing, sum(index >= first for index in layers), every),
    )


def _groups_at_end(num_trained: int, every: int) -> int:
    """Return the groups to keep at the top and the bottom, so many that ceil(layers / checkpoints) is
    ``every`` for the few too; of q groups of k and one of r it is where q + r >= k."""
    rest = num_trained % every
    return max(_AT_EACH_END, -(-(every - rest) // 2) + 1 if rest else 0)


def _kept_groups(
    names: Sequence[Hashable], *, num_frozen: int, at_end: int
) -> tuple[list[int], dict[tuple[bool, Hashable], int]]:
    """Return the numbers of the groups to run, in order, and of every kind one that is like all the others.

    That is none at the bottom: the last use of what all layers share, as the cosines of the positions, is
    there. And not the highest: its input may not have left for the host when the backward pass asks for it.
    """
    count = len(names)
    kept = set(range(min(_AT_EACH_END, num_frozen)))
    kept |= set(range(num_frozen, min(num_frozen + at_end, count)))
    kept |= set(range(max(num_frozen, count - at_end), count))
    inner: dict[tuple[bool, Hashable], int] = {}
    for number in range(min(1, num_frozen), num_frozen):
        inner.setdefault((True, names[number]), number)
    # from the top: the second highest, which is run anyway, where it is of the kind
    for number in range(count - 2, num_frozen + at_end - 1, -1):
        inner.setdefault((False, names[number]), number)
    return sorted(kept | set(inner.values())), inner


def _shorter_adapter(adapter: AdapterSettings, layers: tuple[int, ...], prompted: range) -> AdapterSettings:
    below = sum(index < prompted.start for index in layers)
    if adapter.top_layers is not None:
        return adapter.model_copy(update={"top_layers": len(layers) - below})
    return adapter.model_copy(update={"start_layer": below})


def _shorter_checkpointing(
    checkpointing: ActivationCheckpointing | None, num_trained: int, every: int
) -> ActivationCheckpointing | None:
    if checkpointing is None or checkpointing.number_checkpoints is None:
        return checkpointing
    return checkpointing.model_copy(update={"number_checkpoints": -(-num_trained // every)})
