"""``launch/train.py``."""

import argparse
import sys
from typing import TYPE_CHECKING

from sparse_llama.cli.entry import is_main, world_size
from sparse_llama.cli.flags import Parser, add_run_flags, overrides, parser
from sparse_llama.errors import ConfigError, OutOfMemoryError

if TYPE_CHECKING:
    from sparse_llama.config.run import Run
    from sparse_llama.training.out_of_memory import Shortage


def train_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/train.py``: a document, and flags that override it for one run."""
    flags = parser(doc)
    add_run_flags(flags)
    add = flags.add_argument_group("memory that is short").add_argument
    add("--ignore_plan", action="store_true", help="start even if the plan says that it cannot fit")
    add(
        "--on_oom",
        choices=("stop", "retry"),
        default="stop",
        help="after out of memory: stop and say what would fit, or go on from the last finished step with "
        "the smallest change that does (one process); what is computed stays the same",
    )
    add("--retry", type=int, default=0, help=argparse.SUPPRESS)  # added by a retry, which counts itself
    return flags


def train(arguments: argparse.Namespace) -> None:
    """Check the configuration, and whether it can fit, then train; only then is torch imported.

    Raises:
        ConfigError: the configuration is wrong, or what it asks for cannot fit.
        OutOfMemoryError: memory ran out all the same; says where, and what would fit.
    """
    from sparse_llama.config.run import load_run

    run = load_run(arguments.ds_config, overrides(arguments), world_size(), is_main=is_main())
    if arguments.on_oom == "retry" and world_size() > 1:
        raise ConfigError(
            f"--on_oom retry: is for one process, this job has {world_size()}: where one runs out of memory "
            "the others wait for it; leave it out, and start again with what the message proposes"
        )

    from sparse_llama.distributed import ranks
    from sparse_llama.training.loop import fit  # seconds: torch, transformers, deepspeed
    from sparse_llama.training.out_of_memory import RunOutOfMemoryError

    run = _planned(run, is_refused=not arguments.ignore_plan)
    try:
        fit(run, num_retries=arguments.retry)
        return
    except RunOutOfMemoryError as error:
        shortage = error.shortage
    finally:
        ranks.finalize()
    _act(run, shortage, arguments)


def _planned(run: "Run", *, is_refused: bool) -> "Run":
    """Return ``run`` with what it leaves to its plan, the same on all ranks.

    Raises:
        ConfigError: on the main rank, if a run that cannot fit ``is_refused``.
    """
    is_left_to_plan = run.settings.memory.head_groups == "auto"
    if is_main() and (is_left_to_plan or is_refused):
        run = _plan(run, is_refused=is_refused)
    return _as_planned_on_main(run) if is_left_to_plan else run


def _plan(run: "Run", *, is_refused: bool) -> "Run":
    from sparse_llama.planning.hardware import this_machine
    from sparse_llama.planning.quick import check_fits, settle
    from sparse_llama.planning.search import Planner
    from sparse_llama.planning.shapes import find_base

    config = find_base(run.settings.model).config  # a plan needs no weights, nor their download
    planner = Planner(config, this_machine(), world_size())
    run = settle(run, planner)
    refusal = check_fits(run, planner) if is_refused else None
    if refusal is not None:
        raise ConfigError(f"{run.name}: {refusal.message}; --ignore_plan starts it anyway")
    return run


def _as_planned_on_main(run: "Run") -> "Run":
    """Return ``run`` with the main rank's ``head_groups``: free memory differs between ranks, layers must
    not."""
    import torch

    from sparse_llama.distributed import ranks
    from sparse_llama.planning.quick import with_head_groups

    ranks.initialize()
    planned = (run.settings.memory.num_head_groups or 0) if is_main() else 0
    count = ranks.broadcast_from_main(torch.tensor(planned, device=ranks.device()))
    return with_head_groups(run, int(count) or None)


def _act(run: "Run", shortage: "Shortage", arguments: argparse.Namespace) -> None:
    """Say what happened and what would fit, then start again with that or stop.

    Raises:
        OutOfMemoryError: the run stops.
    """
    from sparse_llama.cli.out_of_memory import MOST_RETRIES, explain, restart, told_change
    from sparse_llama.planning.advice import advise_apart
    from sparse_llama.planning.shapes import find_base
    from sparse_llama.training.retries import add_retry

    rank = f" (rank {shortage.rank})" if world_size() > 1 else ""
    print(f"out of memory{rank}; working out what would fit ...", file=sys.stderr, flush=True)
    try:
        config = find_base(run.settings.model).config
        advice = advise_apart(run, config, shortage, world_size())
    except Exception as error:  # of another process, whatever it was; what ran out here is said all the same
        reason = f"what would fit could not be worked out: {type(error).__name__}: {error}"
        raise OutOfMemoryError(explain(shortage, None, (), reason=reason)) from None
    first = next((change for change in advice.changes if change.is_same_run and change.flags), None)
    number, reason = arguments.retry + 1, ""
    if not advice.changes:
        reason = "no setting makes this run fit; use a shorter context, a smaller base, or more memory"
    elif arguments.on_oom == "retry" and first is None:
        reason = "not retried: no setting that leaves the run what it is would fit"
    elif arguments.on_oom == "retry" and number > MOST_RETRIES:
        reason = f"not retried: {MOST_RETRIES} times is enough"
    elif arguments.on_oom == "retry" and first is not None:
        message = explain(shortage, advice.planned, advice.changes)
        print(f"\n{message}\n\nretry {number}: {told_change(first)}\n", file=sys.stderr, flush=True)
        add_retry(run.output_dir, shortage, change=first.sentence, flags=list(first.flags))
        restart(run, shortage, first, number)
    raise OutOfMemoryError(explain(shortage, advice.planned, advice.changes, reason=reason))
