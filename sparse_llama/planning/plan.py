"""The plan of a run: what it needs, whether that is there, how far it could go, and what would take it
further."""

from dataclasses import asdict, dataclass
from typing import Any

from sparse_llama.config.run import Run
from sparse_llama.memory.checkpointing import inputs_every
from sparse_llama.planning.estimate import Estimate, Place
from sparse_llama.planning.levers import Lever, Rung, combine, ladder, num_trained_layers, number_checkpoints
from sparse_llama.planning.quick import Change, candidates, find_changes
from sparse_llama.planning.roofline import StepTime, plan_of, step_time
from sparse_llama.planning.search import Longest, Planner, at_length
from sparse_llama.reporting.rates import Rates

_WORTH = 1.02  # a longest length grown by less is no gain
ROUGH = 0.01
"""Precision of the lengths that are only compared: within a hundredth."""


@dataclass(frozen=True)
class Plan:
    """A run on a machine."""

    run: Run
    estimate: Estimate
    needs: dict[Place, int]
    fits: bool
    longest: Longest
    density: float
    """Of the layouts, averaged over layers."""
    changes: tuple[Change, ...]
    """With which a run that does not fit does; empty where it fits."""
    time: StepTime | None
    """None on a CPU, whose speed no table knows."""


@dataclass(frozen=True)
class NextLever:
    """What takes a run's rows further, and how far."""

    lever: Lever
    longest: Longest


@dataclass(frozen=True)
class RungLength:
    """How far a rung of the ladder reaches."""

    rung: Rung
    lever: Lever
    """The rung's and what came with it, beside nothing else of the run's."""
    run: Run
    longest: Longest


def make_plan(run: Run, planner: Planner, rates: Rates | None) -> Plan:
    """Return the plan of ``run``; the settings that would fit are looked for only where it does not."""
    made = planner.at(run)
    fits = planner.fits(made)
    return Plan(
        run=run,
        estimate=made,
        needs=planner.needs(made),
        fits=fits,
        longest=planner.longest(run),
        density=plan_of(run, planner.config).density_at(run.settings.seq_length),
        changes=() if fits else tuple(find_changes(run, planner)),
        time=None if rates is None else step_time(run, planner.config, made, rates),
    )


def next_lever(run: Run, planner: Planner, longest: Longest) -> NextLever | None:
    """Return the first lever, by its cost in time, that lets ``run`` have longer rows; None where none
    does."""
    if longest.num_tokens == 0 or longest.binds is None:
        return None
    at_end = at_length(run, longest.num_tokens)
    before = max(planner.shares(planner.at(at_end)).values())
    for lever in candidates(run, planner):
        changed = lever.apply(run)
        after = max(planner.shares(planner.at(lever.apply(at_end))).values())
        if after * _WORTH > before:
            continue
        found = planner.longest(changed, start=round(longest.num_tokens / after), precision=ROUGH)
        if found.num_tokens >= _WORTH * longest.num_tokens:
            return NextLever(lever, found)
    return None


def climb(run: Run, planner: Planner) -> list[RungLength]:
    """Return the longest row of every rung of the ladder, for a run of these micro-batches."""
    found: list[RungLength] = []
    start: int | None = None
    num_trained, sharing = num_trained_layers(run, planner.config), run.sequence_parallel_size
    for rung in ladder(planner.hardware.device, planner.config, num_trained, sharing):
        lever = rung.lever(run)
        on_rung = lever.apply(run)
        longest = planner.longest(on_rung, start=start, precision=ROUGH)
        found.append(RungLength(rung, lever, on_rung, longest))
        start = longest.num_tokens or None
    return found


def reach(rungs: list[RungLength], planner: Planner) -> RungLength | None:
    """Return the settings that reach furthest: of those within a fiftieth of the longest, the first, which
    takes the least time. Where host memory stops a rung, every second layer's input is kept, every fourth and
    so on. None where nothing fits.
    """
    tried: list[RungLength] = []
    for one in rungs:
        tried.append(one)
        block, trained = one.run.checkpointing, num_trained_layers(one.run, planner.config)
        if block is None or not block.cpu_checkpointing:
            continue
        every = 2 * inputs_every(trained, block.number_checkpoints)
        while tried[-1].longest.binds == "host" and every <= trained // 2:
            lever = combine((one.lever, number_checkpoints(every, trained)))
            every *= 2
            changed = lever.apply(one.run)
            longest = planner.longest(changed, start=tried[-1].longest.num_tokens or None, precision=ROUGH)
            tried.append(RungLength(one.rung, lever, changed, longest))
    furthest = max((one.longest.num_tokens for one in tried), default=0)
    return next((one for one in tried if one.longest.num_tokens * _WORTH >= furthest > 0), None)


def plan_to_json(plan: Plan, planner: Planner) -> dict[str, Any]:
    """Return a plan as JSON holds it: all of it, bytes as whole numbers."""
    made, run = plan.estimate, plan.run
    return {
        "name": run.name,
        "seq_length": run.settings.seq_length,
        "micro_batch_size": run.micro_batch_size,
        "adapter": run.settings.adapter.version,
        "attention": str(run.layouts),
        "density": plan.density,
        "memory": run.settings.memory.model_dump(mode="json"),
        "activation_checkpointing": run.deepspeed.get("activation_checkpointing"),
        "zero_optimization": run.deepspeed["zero_optimization"],
        "fits": plan.fits,
        "needs_bytes": plan.needs,
        "usable_bytes": {place: planner.hardware.usable_bytes(place) for place in plan.needs},
        "phase": made.phase,
        "components_bytes": made.components,
        "alive_at_peak": [asdict(one) for one in made.alive],
        "saved_bytes_per_token_and_layer": made.saved_bytes_per_token_and_layer,
        "traffic_bytes": asdict(made.traffic_bytes),
        "flops": made.flops,
        "step_s": None if plan.time is None else asdict(plan.time) | {"total_s": plan.time.total_s},
        "longest": longest_to_json(plan.longest),
        "changes": [asdict(change) for change in plan.changes],
    }


def longest_to_json(longest: Longest) -> dict[str, Any]:
    """Return a longest length as JSON holds it."""
    return {"num_tokens": longest.num_tokens, "binds": longest.binds}


def ladder_to_json(rungs: list[RungLength], planner: Planner) -> list[dict[str, Any]]:
    """Return the ladder as JSON holds it."""
    return [
        {
            "rung": one.rung.number,
            "name": one.rung.name,
            "flags": list(one.lever.flags),
            "keys": dict(one.lever.keys),
            "needs_bytes": None if one.longest.estimate is None else planner.needs(one.longest.estimate),
            **longest_to_json(one.longest),
        }
        for one in rungs
    ]
