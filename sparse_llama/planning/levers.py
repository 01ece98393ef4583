"""The levers of memory: changes to a run that cost time and never change what it computes."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import LlamaConfig

from sparse_llama.attention.core import head_shares, heads_of_group
from sparse_llama.config.run import Run
from sparse_llama.config.settings import MemorySettings

TILE = 2048
"""Tokens of a tile: large enough to keep matrix products efficient, 0.8 GB of logits at V = 32,000."""
_MEMORY = "sparse_llama.memory."
_BUCKET = "zero_optimization.reduce_bucket_size"
_SMALL_BUCKET = 5 * 10**6  # elements; an adapter of LLaMA-7B has 4.3 million in all


@dataclass(frozen=True)
class Lever:
    """A change of settings: what to write into the JSON document, and the flags that do the same."""

    name: str
    """Short, for tables."""
    sentence: str
    """What it does, and what it costs in time."""
    keys: Mapping[str, Any]
    """Dotted path in the document to value; None takes the key out."""
    flags: tuple[str, ...] = ()
    """Of ``launch/train.py``."""

    def apply(self, run: Run) -> Run:
        """Return ``run`` with this lever."""
        deepspeed, memory = copy.deepcopy(run.deepspeed), run.settings.memory.model_dump()
        for path, value in self.keys.items():
            if path.startswith(_MEMORY):
                memory[path.removeprefix(_MEMORY)] = value
            else:
                set_key(deepspeed, path, value)
        settings = run.settings.model_copy(update={"memory": MemorySettings.model_validate(memory)})
        return replace(run, deepspeed=deepspeed, settings=settings)

    def is_on(self, run: Run) -> bool:
        """Return whether it would change nothing."""
        changed = self.apply(run)
        return changed.deepspeed == run.deepspeed and changed.settings == run.settings


def combine(levers: Sequence[Lever]) -> Lever:
    """Return several levers as one."""
    keys = {path: value for lever in levers for path, value in lever.keys.items()}
    flags: dict[str, str] = {}
    for lever in levers:
        flags |= dict(zip(lever.flags[::2], lever.flags[1::2], strict=True))
    return Lever(
        name=" + ".join(lever.name for lever in levers),
        sentence="; ".join(lever.sentence for lever in levers),
        keys=keys,
        flags=tuple(word for pair in flags.items() for word in pair),
    )


def set_key(document: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted ``path`` in a document, making blocks on the way; None takes the key out."""
    *parents, last = path.split(".")
    block = document
    for name in parents:
        if not isinstance(block.get(name), dict):
            if value is None:
                return
            block[name] = {}
        block = block[name]
    if value is None:
        block.pop(last, None)
    else:
        block[last] = value


def tile(name: str, tokens: int = TILE) -> Lever:
    """Return the lever ``loss_tile``, ``mlp_tile`` or ``norm_tile``."""
    what = {
        "loss_tile": "labelled tokens' logits at a time; costs no time",
        "mlp_tile": "tokens in an MLP at a time; no time under a checkpoint, else one more product of three",
        "norm_tile": "tokens in a norm at a time; v2 projects q, k and v once more, v1 pays nothing",
    }
    return Lever(
        f"{name} {tokens:,}",
        f"{tokens:,} {what[name]}",
        {f"{_MEMORY}{name}": tokens},
        (f"--{name}", str(tokens)),
    )


def checkpoint(where: str, nvme_path: str | None = None) -> Lever:
    """Return the lever that keeps layers' inputs only: ``gpu`` beside the model, ``cpu`` in host memory,
    ``nvme`` on the drive."""
    keys: dict[str, Any] = {
        "activation_checkpointing.cpu_checkpointing": where != "gpu",
        f"{_MEMORY}checkpoint_nvme_path": nvme_path if where == "nvme" else None,
    }
    sentence = {
        "gpu": "keep only layers' inputs, compute the rest again; one more forward pass",
        "cpu": "layers' inputs wait in host memory; no time where the bus keeps up, as at 7B",
        "nvme": "layers' inputs wait on the drive; as much time as it takes to write and read them",
    }[where]
    path = ("--nvme_path", nvme_path) if where == "nvme" and nvme_path is not None else ()
    return Lever(f"checkpoints on {where}", sentence, keys, ("--checkpointing", where, *path))


def small_buckets(run: Run) -> Lever | None:
    """Return the lever that makes DeepSpeed's buffer for gradients as large as the adapter, as it is where
    the document names no size; None where it is that, or smaller than most adapters."""
    zero = run.deepspeed["zero_optimization"]
    size = zero.get("reduce_bucket_size", "auto")
    if zero["stage"] == 0 or size == "auto" or size <= _SMALL_BUCKET:
        return None
    sentence = "DeepSpeed's buffer for gradients no larger than the adapter; costs no time"
    return Lever("small buckets", sentence, {_BUCKET: "auto"})


def head_groups(groups: int) -> Lever:
    """Return the lever that computes a layer by groups of heads."""
    sentence = f"attention of {groups} groups of heads, one at a time; takes about the time of tiled layers"
    return Lever(
        f"head_groups {groups}", sentence, {f"{_MEMORY}head_groups": groups}, ("--head_groups", str(groups))
    )


def number_checkpoints(every: int, num_trained: int) -> Lever:
    """Return the lever that keeps one of ``every`` inputs of the ``num_trained`` layers that train."""
    kept = -(-num_trained // every)
    sentence = f"keep every {ordinal(every)} layer's input; {every - 1}/{every} of a forward pass more"
    keys = {"activation_checkpointing.number_checkpoints": kept}
    return Lever(f"number_checkpoints {kept}", sentence, keys, ("--number_checkpoints", str(kept)))


def smaller_micro_batch(run: Run) -> Lever | None:
    """Return the lever of half the micro-batch and twice the accumulation, or of the largest smaller
    micro-batch that divides; None where it is one row already. The rows of a step stay the same."""
    micro = run.micro_batch_size
    smaller = next((size for size in range(micro // 2, 0, -1) if micro % size == 0), None)
    if smaller is None:
        return None
    return _micro_batches(run, smaller)


def one_row(run: Run) -> Lever:
    """Return the lever of micro-batches of one row, and as many to a step as there were rows."""
    return _micro_batches(run, 1)


def _micro_batches(run: Run, size: int) -> Lever:
    accumulation = run.micro_batch_size * run.gradient_accumulation_steps // size
    return Lever(
        f"micro-batch {size}",
        f"micro-batches of {rows(size)}, {accumulation} to a step; costs time below about 2,048 tokens",
        {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": accumulation},
        ("--micro_batch_size", str(size)),
    )


def rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def ordinal(number: int) -> str:
    """Return ``2nd`` of 2."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


STREAMED = Lever(
    "weights streamed",
    "ZeRO stage 3 keeps the weights in host memory; no time from about 7,500 tokens of a micro-batch on",
    {
        "zero_optimization.stage": 3,
        "zero_optimization.offload_optimizer.device": "cpu",
        "zero_optimization.offload_param.device": "cpu",
    },
    ("--zero_stage", "3", "--offload", "cpu"),
)


@dataclass(frozen=True)
class Rung:
    """A combination of levers of the ladder."""

    number: int
    name: str
    levers: tuple[Lever, ...]

    def lever(self, run: Run) -> Lever:
        """Return what makes these levers those of ``run``, and takes every other one back."""
        return combine((_nothing(run), *self.levers))


def num_trained_layers(run: Run, config: LlamaConfig) -> int:
    """Return how many layers have a part of the adapter: those whose inputs a checkpoint keeps."""
    return len(run.settings.adapter.adapted_layers(config.num_hidden_layers))


def group_counts(config: LlamaConfig, sharing: int = 1) -> tuple[int, ...]:
    """Return in how many groups of heads a layer of this model is proposed to be computed: 4 and 8, or 2
    where 4 is too many; none where it has one head.

    Args:
        sharing: sequence-parallel ranks, which share out the heads of each group.
    """
    num_heads = config.num_attention_heads
    num_kv_heads = config.num_key_value_heads or num_heads
    counts = [
        count
        for count in (2, 4, 8)
        if count in head_shares(num_heads, num_kv_heads)
        and sharing in head_shares(*heads_of_group(num_heads, num_kv_heads, count))
    ]
    return tuple(counts[-2:] if counts[-1:] == [8] else counts[-1:])


def ladder(device: str, config: LlamaConfig, num_trained: int, sharing: int = 1) -> tuple[Rung, ...]:
    """Return the rungs, each holding those before it but for the weights: they are streamed in the last ones
    alone, beside the simple layer and beside the one of head groups. On a CPU, whose memory is the host's,
    there is nowhere to move to.

    Args:
        num_trained: layers whose inputs a checkpoint keeps.
        sharing: sequence-parallel ranks.
    """
    simple = (checkpoint("gpu"), tile("loss_tile"), tile("mlp_tile"), tile("norm_tile"))
    names = ("nothing", "a checkpoint per layer", "+ tiled loss", "+ tiled MLP", "+ tiled norm")
    rungs = [(name, simple[:count]) for count, name in enumerate(names)]
    host = (*simple, checkpoint("cpu")) if device == "cuda" else simple
    if device == "cuda":
        rungs.append(("+ checkpoints on the host", host))
    counts = group_counts(config, sharing)
    rungs += [(f"+ {groups} head groups", (*host, head_groups(groups))) for groups in counts]
    if device == "cuda":
        last = len(rungs) - 1
        rungs.append(("rung 5, weights streamed", (*host, STREAMED)))
        if last > 5:
            rungs.append((f"rung {last}, weights streamed", (*rungs[last][1], STREAMED)))
        if num_trained > 1:
            few = number_checkpoints(2, num_trained)
            rungs.append(("+ every 2nd input kept", (*rungs[-1][1], few)))
    return tuple(Rung(number, name, levers) for number, (name, levers) in enumerate(rungs))


def _nothing(run: Run) -> Lever:
    """Return the lever that takes every other one of ``run`` back; only DeepSpeed's buffers are as large as
    the adapter in every rung, for that is never worth a gigabyte."""
    keys: dict[str, Any] = {f"{_MEMORY}{name}": None for name in MemorySettings.model_fields}
    keys["activation_checkpointing"] = None
    keys[_BUCKET] = None
    zero = run.deepspeed["zero_optimization"]
    if "offload_param" in zero:
        keys |= {"zero_optimization.stage": 2, "zero_optimization.offload_param": None}
        if zero.get("offload_optimizer", {}).get("device") == "nvme":  # which only stage 3 can
            keys["zero_optimization.offload_optimizer"] = None
    return Lever("nothing", "no lever", keys)
