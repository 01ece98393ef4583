"""A journal cut into phases, and the phases of a few layers put together to those of all.

Layers alike allocate alike: a phase of one changes what is alive by the same amount, and rises by the same
amount above where it began, wherever the layer stands. So a model of many layers is run with few, of each
kind one, and the step of all of them is added up. It is exact, not a fit: a test compares it with the run of
all layers.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from sparse_llama.planning.tracker import Journal, Kind, Place

Alive = Counter[Kind]
"""Bytes by kind."""


@dataclass
class Phase:
    """What a phase of a step does to memory."""

    label: str
    layer: int | None
    start: Alive
    """Alive when it begins."""
    peaks: dict[Place, Alive] = field(default_factory=dict)
    """Alive at each place when that has most in this phase."""
    change: Alive = field(default_factory=Counter)
    """Alive at its end less alive at its start; negative where memory was released."""
    copied: Counter[tuple[Place, Place]] = field(default_factory=Counter)
    flops: int = 0


def cut_into_phases(journal: Journal) -> list[Phase]:
    """Return the phases of ``journal`` in order; the last moment begins the last of them."""
    events = _events(journal)
    bounds = [moment.tick for moment in journal.moments] + [journal.ticks + 1]
    peak_ticks = _peak_ticks(events, bounds)
    alive: Alive = Counter()
    phases: list[Phase] = []
    position = 0
    for index, moment in enumerate(journal.moments):
        phase = Phase(moment.label, moment.layer, start=+alive)
        wanted = peak_ticks[index]
        phase.peaks = {place: phase.start for place in wanted}
        while position < len(events) and events[position].tick < bounds[index + 1]:
            event = events[position]
            alive[event.kind] += event.num_bytes
            for place, tick in wanted.items():
                if tick == event.tick:
                    phase.peaks[place] = +alive
            position += 1
        phase.change = difference(alive, phase.start)
        phases.append(phase)
    _add_work(journal, phases, bounds)
    return phases


def compose(phases: Sequence[Phase], traced_of: Sequence[int], other_weights: Alive) -> list[Phase]:
    """Return the phases of a model of ``len(traced_of)`` layers.

    Args:
        phases: of a model of a few layers.
        traced_of: the layer among those that each layer is like.
        other_weights: of all layers' parameters, what the few layers' do not hold.
    """
    traced = {(phase.label, phase.layer): phase for phase in phases}
    alive: Alive = Counter()
    whole: list[Phase] = []
    for label in dict.fromkeys(phase.label for phase in phases):
        for layer in _layers_of(label, len(traced_of)):
            phase = traced.get((label, None if layer is None else traced_of[layer]))
            if phase is None:  # no backward pass goes there
                continue
            peaks: dict[Place, Alive] = {}
            for place, peak in phase.peaks.items():
                peaks[place] = add(alive, difference(peak, phase.start))
            whole.append(Phase(label, layer, alive, peaks, phase.change, phase.copied, phase.flops))
            alive = add(alive, phase.change, other_weights if label == "model" else Counter())
    return whole


def _layers_of(label: str, num_layers: int) -> Iterable[int | None]:
    if label == "forward":
        return range(num_layers)
    return reversed(range(num_layers)) if label == "backward" else (None,)


def size_of(alive: Alive, place: Place) -> int:
    """Return the bytes at a place."""
    return sum(num_bytes for kind, num_bytes in alive.items() if kind.place == place)


class _Event(NamedTuple):
    tick: int
    kind: Kind
    num_bytes: int


def _events(journal: Journal) -> list[_Event]:
    events = [_Event(one.born, one.kind, one.kind.num_bytes) for one in journal.allocations]
    events += [
        _Event(one.died, one.kind, -one.kind.num_bytes) for one in journal.allocations if one.died is not None
    ]
    return sorted(events, key=lambda event: event.tick)


def _peak_ticks(events: list[_Event], bounds: list[int]) -> list[dict[Place, int]]:
    """Return the tick of each place's peak in every phase; the phase's start where nothing rises above it."""
    now: Counter[Place] = Counter()
    found: list[dict[Place, int]] = []
    position = 0
    for first, last in pairwise(bounds):
        most: dict[Place, int] = dict(now)
        ticks: dict[Place, int] = dict.fromkeys(now, first)
        while position < len(events) and events[position].tick < last:
            event = events[position]
            place = event.kind.place
            now[place] += event.num_bytes
            if now[place] > most.get(place, -1):
                most[place], ticks[place] = now[place], event.tick
            position += 1
        found.append(ticks)
    return found


def _add_work(journal: Journal, phases: list[Phase], bounds: list[int]) -> None:
    copies, flops = iter(journal.copies), iter(journal.flops)
    copy, product = next(copies, None), next(flops, None)
    for phase, last in zip(phases, bounds[1:], strict=True):
        while copy is not None and copy.tick < last:
            phase.copied[copy.source, copy.target] += copy.num_bytes
            copy = next(copies, None)
        while product is not None and product[0] < last:
            phase.flops += product[1]
            product = next(flops, None)


def add(*parts: Alive) -> Alive:
    """Return the sum by kind; unlike ``+`` of counters it keeps what is negative."""
    total: Alive = Counter()
    for part in parts:
        total.update(part)
    return total


def difference(larger: Alive, smaller: Alive) -> Alive:
    """Return what has to be added to ``smaller`` for ``larger``."""
    change: Alive = Counter(larger)
    change.subtract(smaller)
    return Counter({kind: num_bytes for kind, num_bytes in change.items() if num_bytes})
