"""The check of every start: whether a run can fit at all, and if not, the smallest change with which it does.

Costs nothing where a run obviously fits: an upper bound in closed form decides, and only above it is the step
traced, in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import LlamaConfig

from sparse_llama.config.run import Run
from sparse_llama.memory.checkpointing import inputs_every
from sparse_llama.planning.estimate import LIBRARY_BYTES, Estimate, Place
from sparse_llama.planning.estimate import estimate as estimate_step
from sparse_llama.planning.hardware import Hardware
from sparse_llama.planning.levers import (
    STREAMED,
    Lever,
    checkpoint,
    combine,
    group_counts,
    head_groups,
    num_trained_layers,
    number_checkpoints,
    one_row,
    small_buckets,
    smaller_micro_batch,
    tile,
)
from sparse_llama.planning.search import PLACES, Estimator, Planner, at_length
from sparse_llama.planning.shapes import head_widths, linear_outputs
from sparse_llama.reporting.tables import format_bytes


@dataclass(frozen=True)
class Change:
    """A change of settings with which a run fits."""

    sentence: str
    """What it is, for people."""
    keys: dict[str, object]
    """Dotted path in the document to value; None takes the key out."""
    flags: tuple[str, ...]
    """That do the same; empty where there are none."""
    needs: dict[Place, int]
    """Bytes that the run needs with it, of each place."""
    saves: dict[Place, int]
    """What it gives; negative where a place takes what another gave."""
    is_same_run: bool = True
    """False of a shorter context, which is another experiment."""

    def __str__(self) -> str:
        return " ".join(self.flags) if self.flags else ", ".join(map(_key, self.keys.items()))


@dataclass(frozen=True)
class Refusal:
    """Why a run cannot fit, and what would."""

    place: Place
    needed_bytes: int
    usable_bytes: int
    estimate: Estimate
    changes: tuple[Change, ...]
    """Smallest first."""

    @property
    def shortage(self) -> str:
        """What is needed and what is there."""
        parts = self.estimate.components.get(self.place, {})
        largest = max(parts, key=lambda name: parts[name], default="")
        most = f", {format_bytes(parts[largest])} of it {largest}" if largest else ""
        what = {"gpu": "of GPU memory", "host": "of host memory", "disk": "on the drive"}[self.place]
        there = format_bytes(self.usable_bytes)
        return f"this run needs {format_bytes(self.needed_bytes)} {what}{most}, and {there} can be used"

    @property
    def message(self) -> str:
        """One line: what is needed, what is there, what to do."""
        line = self.shortage
        same = [change for change in self.changes if change.is_same_run]
        if same:
            return f"{line}; the smallest change that fits: {same[0]} ({same[0].sentence})"
        if self.changes:
            return f"{line}; no setting of memory makes it fit; {self.changes[0]} would"
        return f"{line}; no setting makes it fit; use a smaller base, or a larger machine"


def check_fits(run: Run, planner: Planner) -> Refusal | None:
    """Return why ``run`` cannot fit; None where it fits."""
    return None if _fits(run, planner) else refusal(run, planner)


def settle(run: Run, planner: Planner) -> Run:
    """Return ``run`` with what it leaves to its plan: ``head_groups`` "auto" is none where the run fits
    without, else the fewest with which it fits. Where no number of them is enough it is none, and the run's
    refusal has what would be."""
    if run.settings.memory.head_groups != "auto":
        return run
    simple = with_head_groups(run, None)
    if _fits(simple, planner):
        return simple
    for count in group_counts(planner.config, run.sequence_parallel_size):
        grouped = with_head_groups(run, count)
        if planner.fits(planner.at(grouped)):
            shortage = _refusal(simple, planner, ()).shortage
            notice = f'sparse_llama.memory.head_groups: "auto" is {count}; without them {shortage}'
            return replace(grouped, notices=(*run.notices, notice))
    return simple


def with_head_groups(run: Run, count: int | None) -> Run:
    """Return ``run`` with its layers computed by ``count`` groups of heads; None is transformers' layer."""
    memory = run.settings.memory.model_copy(update={"head_groups": count})
    return replace(run, settings=run.settings.model_copy(update={"memory": memory}))


def _fits(run: Run, planner: Planner) -> bool:
    bound = upper_bound_bytes(run, planner.config, planner.hardware, planner.ranks)
    return bound <= _least_usable(planner.hardware) or planner.fits(planner.at(run))


def refusal(run: Run, planner: Planner) -> Refusal:
    """Return the refusal of a run that does not fit."""
    return _refusal(run, planner, find_changes(run, planner))


def _refusal(run: Run, planner: Planner, changes: Sequence[Change]) -> Refusal:
    made = planner.at(run)
    place = planner.binds(made)
    usable = planner.hardware.usable_bytes(place)
    assert usable is not None, "a place without a limit binds nothing"
    return Refusal(place, planner.needs(made)[place], usable, made, tuple(changes))


def smallest_changes(
    run: Run, config: LlamaConfig, hardware: Hardware, ranks: int = 1, estimator: Estimator = estimate_step
) -> list[Change]:
    """Return the changes of settings with which ``run`` fits ``hardware``, smallest first: the least time,
    then the fewest settings. None but the last, a shorter context, changes what is computed."""
    return find_changes(run, Planner(config, hardware, ranks, estimator))


def find_changes(run: Run, planner: Planner) -> list[Change]:
    """Return ``smallest_changes`` of a planner, which keeps what it has estimated."""
    levers = candidates(run, planner)
    before = planner.needs(planner.at(run))
    found = [lever for lever in levers if planner.fits(planner.at(lever.apply(run)))]
    if not found:
        several = _several(run, planner, levers)
        found = [] if several is None else [several]
    changes = [_change(lever.sentence, lever, lever.apply(run), planner, before) for lever in found]
    return [*changes, *_shorter(run, planner, before)]


def candidates(run: Run, planner: Planner) -> list[Lever]:
    """Return the levers that are not on yet, the least time first."""
    on_gpu, memory, block = planner.hardware.device == "cuda", run.settings.memory, run.checkpointing
    early = ("loss_tile",) if block is None else ("loss_tile", "mlp_tile")
    late = [name for name in ("norm_tile", "mlp_tile") if name not in early]
    levers = [tile(name) for name in early if getattr(memory, name) is None]
    found = (small_buckets(run), smaller_micro_batch(run))
    levers += [lever for lever in found if lever is not None]
    levers += [one_row(run)] if run.micro_batch_size > 2 else []
    offloads = block is not None and block.cpu_checkpointing
    if block is None:
        levers.append(checkpoint("gpu"))
    elif on_gpu and not offloads:
        levers.append(checkpoint("cpu"))
    levers += [tile(name) for name in late if getattr(memory, name) is None]
    if block is None and on_gpu:
        levers.append(checkpoint("cpu"))
    counts = group_counts(planner.config, run.sequence_parallel_size)
    levers += [head_groups(count) for count in counts if (memory.num_head_groups or 1) < count]
    if on_gpu and "offload_param" not in run.deepspeed["zero_optimization"]:
        levers.append(STREAMED)
    levers += [] if block is None else _fewer_checkpoints(run, planner)
    return levers


def _fewer_checkpoints(run: Run, planner: Planner) -> list[Lever]:
    block, trained = run.checkpointing, num_trained_layers(run, planner.config)
    every = 1 if block is None else inputs_every(trained, block.number_checkpoints)
    return [number_checkpoints(factor * every, trained) for factor in (2, 4) if factor * every < trained]


def _several(run: Run, planner: Planner, levers: list[Lever]) -> Lever | None:
    """Return several levers that fit together, none of which can be left out; None where not even all fit."""
    taken: list[Lever] = []
    fitting = False
    order = [lever for lever in levers if lever is not STREAMED]
    # beside a checkpoint only; and streamed weights take room on the host, which these give
    order += _fewer_checkpoints(run, planner) if run.checkpointing is None else []
    order += [lever for lever in levers if lever is STREAMED]
    for lever in order:
        taken.append(lever)
        fitting = planner.fits(planner.at(combine(taken).apply(run)))
        if fitting:
            break
    if not fitting:
        return None
    for lever in reversed(taken[:-1]):
        fewer = [one for one in taken if one is not lever]
        if len(fewer) > 1 and planner.fits(planner.at(combine(fewer).apply(run))):
            taken = fewer
    return combine(taken)


def _shorter(run: Run, planner: Planner, before: dict[Place, int]) -> list[Change]:
    """Return the longest context that fits without any other change, where there is one."""
    longest = planner.longest(run, precision=0.02)
    if not 0 < longest.num_tokens < run.settings.seq_length:
        return []
    number = str(longest.num_tokens)
    sentence = f"a shorter context, {longest.num_tokens:,} tokens: another experiment, not this one"
    lever = Lever("", sentence, {"sparse_llama.seq_length": longest.num_tokens}, ("--seq_length", number))
    return [_change(sentence, lever, at_length(run, longest.num_tokens), planner, before, is_same_run=False)]


def _change(
    sentence: str,
    lever: Lever,
    changed: Run,
    planner: Planner,
    before: dict[Place, int],
    *,
    is_same_run: bool = True,
) -> Change:
    needs = planner.needs(planner.at(changed))
    saves: dict[Place, int] = {place: before[place] - needs[place] for place in PLACES}
    return Change(sentence, dict(lever.keys), lever.flags, needs, saves, is_same_run)


def _key(item: tuple[str, object]) -> str:
    path, value = item
    return f"no {path}" if value is None else f"{path} {value}"


def _least_usable(hardware: Hardware) -> int:
    limits = (hardware.usable_bytes(place) for place in ("gpu", "host"))
    return min(limit for limit in limits if limit is not None)


def upper_bound_bytes(run: Run, config: LlamaConfig, hardware: Hardware, ranks: int) -> int:
    """Return more bytes than ``ranks`` processes of ``run`` can need of any place, whatever it saves; from
    the sizes alone, in microseconds.

    Nothing is checkpointed, tiled, streamed or shared among ranks in it; every linear layer and norm keeps
    its input and its output, every token is labelled, and the largest backward pass of a layer is added. A
    reference attention's quadratic scores are in it where the run asks for that backend.
    """
    width, mlp_width, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    num_layers, outputs = config.num_hidden_layers, sum(linear_outputs(config).values())
    heads = sum(head_widths(config))
    size = 4 if run.precision == "fp32" else 2
    layer_weights = 2 * width * heads + 3 * width * mlp_width + 2 * width
    weights = 2 * vocabulary * width + num_layers * layer_weights
    adapter_of_layer = (run.settings.adapter.prompt_length + 2) * width + 2 * outputs + 64
    adapted = num_layers * adapter_of_layer + 2 * vocabulary + width
    tokens = run.micro_batch_size * run.settings.seq_length
    kept = size * (8 * width + 6 * heads + 8 * mlp_width) + 4 * (6 * width + 64 * config.num_attention_heads)
    passing = 4 * (20 * width + 12 * heads + 10 * mlp_width) + 24 * vocabulary
    scores = 0
    if run.settings.attention.backend == "reference":
        scores = 6 * 4 * config.num_attention_heads * tokens * run.settings.seq_length
        scores *= num_layers
    step = tokens * (num_layers * kept + passing) + scores
    # weights twice: once as they are read, once where they stay; masters, gradients and two moments in fp32
    one = 2 * weights * size + 32 * adapted + step
    return ranks * (one + LIBRARY_BYTES["cuda"])  # the larger: a data set is in memory too
