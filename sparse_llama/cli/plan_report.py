"""What ``launch/plan_memory.py`` says of a plan: rows of its tables."""

from typing import Any

from sparse_llama.config.run import Run
from sparse_llama.planning.hardware import GPU_RESERVE_BYTES, Hardware
from sparse_llama.planning.levers import rows as count_rows
from sparse_llama.planning.plan import NextLever, Plan, RungLength, longest_to_json
from sparse_llama.planning.search import Longest, Planner
from sparse_llama.planning.shapes import Base
from sparse_llama.reporting.rates import Rates
from sparse_llama.reporting.tables import format_bytes, format_seconds, format_share
from sparse_llama.training.report import memory_line

_SHOWN = 14  # tensors; the rest is one line
_FIXED = ("weights", "adapters", "gradients", "optimizer", "DeepSpeed's buffers", "libraries")
"""Components that do not grow with the row."""
_PLACES = {"gpu": "GPU", "host": "host", "disk": "disk"}
LADDER_HEADER = ["rung", "levers", "longest row", "GPU", "host", "stops at"]
ALIVE_HEADER = ["component", "where", "tensors", "bytes", "u"]


def run_rows(plan: Plan, planner: Planner) -> list[tuple[str, str]]:
    """Return what is planned, and on what."""
    run, settings = plan.run, plan.run.settings
    sharing = run.sequence_parallel_size
    tokens = f"{count_rows(run.micro_batch_size)} x {settings.seq_length:,} tokens"
    if sharing > 1:
        tokens += f", each shared by {sharing} ranks"
    attention = "dense" if run.layouts.is_dense else f"{run.layouts}, density {plan.density:.3f}"
    zero = f"stage {run.zero_stage}" + ("" if run.offload == "none" else f", offload to {run.offload}")
    return [
        ("model", f"{settings.model.path}, {run.precision}"),
        ("adapter", f"{settings.adapter.version}; attention {attention}"),
        ("micro-batch", f"{tokens}; {run.gradient_accumulation_steps} to a step"),
        ("ZeRO", f"{zero}; {planner.ranks} process{'es' if planner.ranks > 1 else ''}"),
        ("memory", memory_line(run)),
        ("hardware", hardware_line(planner.hardware)),
    ]


def hardware_line(hardware: Hardware) -> str:
    """Return the budgets."""
    host = f"{format_bytes(hardware.host_bytes)} of host memory"
    disk = "" if hardware.disk_bytes is None else f", {format_bytes(hardware.disk_bytes)} on the drive"
    whose = " (this machine)" if hardware.is_this_machine else ""
    if hardware.gpu_bytes is None:
        return f"CPU; {host}{disk}{whose}"
    reserve = f"{format_bytes(GPU_RESERVE_BYTES)} of it left to CUDA and fragmentation"
    return f"GPU of {format_bytes(hardware.gpu_bytes)}, {reserve}; {host}{disk}{whose}"


def verdict(plan: Plan, planner: Planner) -> str:
    """Return whether it fits, in one line."""
    shares = planner.shares(plan.estimate)
    parts: list[str] = []
    for place in shares:
        usable = planner.hardware.usable_bytes(place)
        assert usable is not None
        needed = plan.needs[place]
        parts.append(f"{_PLACES[place]} {format_bytes(needed)} of {format_bytes(usable)}")
    return f"{'fits' if plan.fits else 'DOES NOT FIT'}: {', '.join(parts)}"


def component_table(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the bytes by component, of one rank, each place at its own peak."""
    made = plan.estimate
    places = [place for place in _PLACES if made.peak_bytes.get(place)]  # type: ignore[arg-type]
    names = dict.fromkeys(name for place in places for name in made.components.get(place, {}))  # type: ignore[arg-type]
    table: list[list[str]] = []
    for name in names:
        parts = [made.components[place].get(name, 0) for place in places]  # type: ignore[index]
        table.append([name, *(format_bytes(part) if part else "-" for part in parts)])
    table.append(["all", *(format_bytes(made.peak_bytes[place]) for place in places)])  # type: ignore[index]
    return ["component", *(_PLACES[place] for place in places)], table


def alive_rows(plan: Plan, width: int) -> list[list[str]]:
    """Return the largest tensors that are alive at the peak, weights and the like left out, under
    ``ALIVE_HEADER``.

    Args:
        width: of the model; u is one tensor of all tokens of a micro-batch by it.
    """
    unit = token_by_width_bytes(plan.run, width)
    passing = [one for one in plan.estimate.alive if one.component not in _FIXED]
    table: list[list[str]] = []
    for one in passing[:_SHOWN]:
        shape = " x ".join(f"{size:,}" for size in one.shape) or "1"
        count = "" if one.count == 1 else f"{one.count} of "
        table.append(
            [
                one.component,
                one.name or "-",
                f"{count}{shape} {one.dtype}",
                format_bytes(one.num_bytes),
                f"{one.num_bytes / unit:.2f}",
            ]
        )
    rest = sum(one.num_bytes for one in passing[_SHOWN:])
    if rest:
        table.append(["", f"{len(passing) - _SHOWN} smaller", "", format_bytes(rest), f"{rest / unit:.2f}"])
    total = sum(one.num_bytes for one in passing)
    table.append(["all of these", "", "", format_bytes(total), f"{total / unit:.2f}"])
    return table


def token_by_width_bytes(run: Run, width: int) -> int:
    """Return the bytes of one tensor of a rank's tokens by the model's width."""
    size = 4 if run.precision == "fp32" else 2
    return size * width * run.micro_batch_size * run.settings.seq_length // run.sequence_parallel_size


def length_rows(plan: Plan, following: NextLever | None, planner: Planner) -> list[tuple[str, str]]:
    """Return the longest row, what stops it, and what would take it further."""
    longest = plan.longest
    rows = [
        (
            "longest row",
            f"{longest.num_tokens:,} tokens with these settings" if longest.num_tokens else "none",
        )
    ]
    if longest.binds is not None:
        rows.append(("stops at", _stops_at(longest, planner)))
    if following is not None:
        lever, reached = following.lever, following.longest.num_tokens
        how = " ".join(lever.flags) or ", ".join(f"{path} {value}" for path, value in lever.keys.items())
        rows.append(("next lever", f"{how} -> {reached:,} tokens: {lever.sentence}"))
    elif longest.num_tokens:
        rows.append(("next lever", "none of this program's"))
    for number, change in enumerate(plan.changes):
        label = "would fit" if number == 0 else ""
        rows.append((label, f"{change}: {change.sentence}"))
    return rows


def _stops_at(longest: Longest, planner: Planner) -> str:
    place, made = longest.binds, longest.estimate
    assert place is not None
    if made is None:
        return _PLACES[place]
    parts = {name: count for name, count in made.components.get(place, {}).items() if name not in _FIXED}
    largest = max(parts, key=lambda name: parts[name], default="")
    when = f", at its peak in {made.phase}" if place == "gpu" or planner.hardware.device == "cpu" else ""
    most = f"; most of what grows is {largest}, {format_bytes(parts[largest])}" if largest else ""
    return f"{_PLACES[place]} memory{when}{most}"


def next_lever_to_json(following: NextLever | None) -> dict[str, Any] | None:
    """Return the next lever as JSON holds it."""
    if following is None:
        return None
    lever = following.lever
    return {
        "flags": list(lever.flags),
        "keys": dict(lever.keys),
        "sentence": lever.sentence,
        "longest": longest_to_json(following.longest),
    }


def time_rows(plan: Plan, rates: Rates | None) -> list[tuple[str, str]]:
    """Return the time and the traffic of a step."""
    traffic, time = plan.estimate.traffic_bytes, plan.time
    rows: list[tuple[str, str]] = []
    if time is not None and rates is not None:
        rows += [
            ("step", f"{_seconds(time.total_s)}: a model of an {rates.name}, not measured; {time.binds}"),
            ("", f"{time.num_tokens / time.total_s:,.0f} tokens/s"),
            (
                "computing",
                f"{_seconds(time.compute_s)}: "
                + ", ".join(
                    f"{name} {format_share(seconds / time.compute_s)}"
                    for name, seconds in (
                        ("matrix products", time.linear_s),
                        ("attention", time.attention_s),
                        ("element by element", time.elementwise_s),
                    )
                ),
            ),
        ]
    for label, count, seconds in (
        ("to the host", traffic.gpu_to_host, None if time is None else time.to_host_s),
        ("from the host", traffic.host_to_gpu, None if time is None else time.from_host_s),
        ("to the drive", traffic.host_to_disk, None),
        ("from the drive", traffic.disk_to_host, None if time is None else time.disk_s),
    ):
        if count:
            hidden = "" if seconds is None else f", {_seconds(seconds)} beside it"
            rows.append((label, f"{format_bytes(count)} a step{hidden}"))
    rows.append(("operations", f"{plan.estimate.flops / 1e12:,.4g} TFLOP a step"))
    return rows


def _seconds(seconds: float) -> str:
    if seconds >= 10:
        return format_seconds(seconds)
    return f"{seconds:.1f}s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def zero_rows(plan: Plan, ranks: int) -> list[tuple[str, str]]:
    """Return what ZeRO's stages can change of this run, and what not."""
    parts = plan.estimate.components
    places = [parts.get(place, {}) for place in ("gpu", "host")]
    weights = max(part.get("weights", 0) for part in places)
    small = sum(part.get(name, 0) for part in places for name in ("optimizer", "gradients"))
    over = "one process: nothing to split" if ranks == 1 else f"split over {ranks} processes"
    return [
        (
            "stages 1, 2",
            f"optimizer state and gradients of the adapter only, {format_bytes(small)} here, {over}; "
            "the base is frozen and has neither",
        ),
        (
            "stage 3",
            f"the weights too, {format_bytes(weights)} here; with --offload cpu they stay on the host "
            "and come layer by layer",
        ),
    ]


def ladder_rows(rungs: list[RungLength], planner: Planner) -> list[list[str]]:
    """Return the ladder under ``LADDER_HEADER``."""
    table: list[list[str]] = []
    for one in rungs:
        needs = {} if one.longest.estimate is None else planner.needs(one.longest.estimate)
        table.append(
            [
                str(one.rung.number),
                one.rung.name,
                f"{one.longest.num_tokens:,}",
                *(format_bytes(needs[place]) if needs.get(place) else "-" for place in ("gpu", "host")),
                "-" if one.longest.binds is None else _PLACES[one.longest.binds],
            ]
        )
    return table


def base_notes(base: Base, plan: Plan, planner: Planner) -> list[str]:
    """Return what has to be said beside the tables."""
    notes = [] if base.notice is None else [base.notice]
    settings, positions = plan.run.settings, base.config.max_position_embeddings
    if settings.seq_length > positions and settings.model.rope_parameters is None:
        notes.append(
            f"the base was made for {positions:,} positions: a run of {settings.seq_length:,} tokens needs "
            "sparse_llama.model.rope_parameters too"
        )
    if planner.hardware.device == "cpu" and plan.run.precision != "fp32":
        notes.append(
            "there is no GPU here, and this is the plan for this CPU; --gpu_gib N plans for a GPU of N GiB"
        )
    return notes


def variant_table(plans: dict[str, Plan]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of several plans side by side."""
    table = [
        [
            name,
            "fits" if plan.fits else "does not fit",
            *(format_bytes(plan.needs[place]) if plan.needs.get(place) else "-" for place in ("gpu", "host")),  # type: ignore[arg-type]
            f"{plan.longest.num_tokens:,}",
            "-" if plan.longest.binds is None else _PLACES[plan.longest.binds],
            "-" if plan.time is None else _seconds(plan.time.total_s),
        ]
        for name, plan in plans.items()
    ]
    return ["variant", "", "GPU", "host", "longest row", "stops at", "step"], table
