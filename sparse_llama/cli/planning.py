"""``launch/plan_memory.py``: what a run needs, before it starts."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_llama.cli.entry import is_main
from sparse_llama.cli.flags import Parser, add_run_flags, make_room_for, overrides, parser
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from sparse_llama.cli.plan_book import PlanBook
    from sparse_llama.config.run import Run
    from sparse_llama.planning.hardware import Hardware
    from sparse_llama.planning.plan import Plan, RungLength
    from sparse_llama.planning.search import Planner
    from sparse_llama.planning.shapes import Base
    from sparse_llama.reporting.rates import Rates

_SCRIPT = "launch/plan_memory.py"
_GIB = 2**30


def plan_memory_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/plan_memory.py``: a run, a machine, and what to find out."""
    flags = parser(doc)
    add_run_flags(flags)
    add = flags.add_argument_group("for which machine (default: this one)").add_argument
    add("--gpu_gib", type=float, metavar="N", help="memory of each GPU; 1.5 GiB of it are not planned with")
    add("--host_gib", type=float, metavar="N", help="host memory for all processes of the run together")
    add("--disk_gib", type=float, metavar="N", help="room on the drive of --nvme_path")
    add("--ranks", type=int, default=1, metavar="N", help="processes, a GPU each, all on one machine")
    add(
        "--gpu",
        choices=("a100", "h100", "rtx4090"),
        help="whose speed times are computed with (default: a100)",
    )
    add = flags.add_argument_group("what to find out").add_argument
    add(
        "--ladder",
        action="store_true",
        help="the longest row with each combination of levers (a minute or two)",
    )
    add(
        "--longest",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="search the settings that reach furthest, and write the document of that run "
        "(default: NAME_longest.json)",
    )
    add("--variants", action="store_true", help="v1 and v2, dense and sparse, side by side")
    add("--json", type=Path, metavar="FILE", help="write all of it there too")
    add("--md", type=Path, metavar="FILE", help="write what is shown there too, as Markdown")
    add("--png", type=Path, metavar="FILE", help="draw the ladder there")
    return flags


def plan_memory(arguments: argparse.Namespace) -> None:
    """Print the plan of a run; no weights are read, and no GPU is needed."""
    if not is_main():
        return  # one plan is one process' work
    _check(arguments)
    from sparse_llama.config.run import load_run

    flags = overrides(arguments)
    run = load_run(arguments.ds_config, flags, arguments.ranks, is_main=False, is_here=False)

    from sparse_llama.cli.plan_book import PlanBook
    from sparse_llama.planning.quick import settle
    from sparse_llama.planning.search import Planner
    from sparse_llama.planning.shapes import find_base

    book = PlanBook()
    base = find_base(run.settings.model)
    planner = Planner(base.config, _hardware(arguments, run), arguments.ranks)
    run = settle(run, planner)
    _show_plan(run, base, planner, _rates(arguments, planner.hardware), book)
    if arguments.variants:
        _show_variants(arguments, planner, book)
    if arguments.ladder or arguments.png is not None or arguments.longest is not None:
        _show_ladder(run, planner, arguments, book)
    if arguments.json is not None:
        book.save_json(arguments.json)
    if arguments.md is not None:
        book.save_markdown(arguments.md, run.name)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers that are none, and files that could not be written."""
    for name in ("gpu_gib", "host_gib", "disk_gib"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < 2**20:
            raise ConfigError(f"--{name}: must be GiB above 0, got {value:g}")
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks: must be >= 1, got {arguments.ranks}")
    if arguments.longest == Path():
        name = "cpu_demo" if arguments.ds_config is None else arguments.ds_config.stem
        arguments.longest = Path(f"{name}_longest.json")
    for name in ("json", "md", "png", "longest"):
        file = getattr(arguments, name)
        if file is not None:
            make_room_for(f"--{name}", file)
    if arguments.longest is not None and arguments.longest.exists() and not _is_ours(arguments.longest):
        raise ConfigError(
            f"--longest {arguments.longest}: exists and was not made by {_SCRIPT}; name another"
        )


def _is_ours(file: Path) -> bool:
    return f'"_made_by": "python {_SCRIPT}' in file.read_text(encoding="utf-8", errors="replace")


def _hardware(arguments: argparse.Namespace, run: "Run") -> "Hardware":
    """Return the machine that the flags name; what they leave out is this one's."""
    from dataclasses import replace

    from sparse_llama.planning.hardware import drive_of, this_machine

    hardware = this_machine(drive_of(run))
    given = {
        f"{place}_bytes": round(value * _GIB)
        for place in ("gpu", "host", "disk")
        if (value := getattr(arguments, f"{place}_gib")) is not None
    }
    return replace(hardware, is_this_machine=not given, **given)


def _rates(arguments: argparse.Namespace, hardware: "Hardware") -> "Rates | None":
    """Return whose speed times are computed with: the GPU asked for, the one here, an A100; none on a CPU."""
    from sparse_llama.reporting.rates import A100, RATES, rates_of
    from sparse_llama.training.metrics import device_name

    if hardware.device == "cpu":
        return None
    return RATES[arguments.gpu] if arguments.gpu is not None else rates_of(device_name()) or A100


def _show_plan(run: "Run", base: "Base", planner: "Planner", rates: "Rates | None", book: "PlanBook") -> None:
    from sparse_llama.cli import plan_report
    from sparse_llama.planning.plan import make_plan, next_lever, plan_to_json
    from sparse_llama.reporting.tables import format_bytes

    plan = make_plan(run, planner, rates)
    book.table(run.name, plan_report.run_rows(plan, planner))
    for note in (*run.notices, *plan_report.base_notes(base, plan, planner)):
        book.note(note)
    book.verdict(plan_report.verdict(plan, planner), is_good=plan.fits)
    book.columns("bytes at the peak", *plan_report.component_table(plan))
    width = base.config.hidden_size
    unit = format_bytes(plan_report.token_by_width_bytes(run, width))
    title = f"alive at the peak, in {plan.estimate.phase}; u is one tensor of tokens by {width:,}, {unit}"
    book.columns(title, plan_report.ALIVE_HEADER, plan_report.alive_rows(plan, width))
    following = next_lever(run, planner, plan.longest)
    book.table("how far", plan_report.length_rows(plan, following, planner))
    book.table("one optimizer step", plan_report.time_rows(plan, rates))
    book.table("ZeRO, over a frozen base", plan_report.zero_rows(plan, planner.ranks))
    book.content |= {
        "hardware": asdict(planner.hardware),
        "ranks": planner.ranks,
        "plan": plan_to_json(plan, planner),
        "next_lever": plan_report.next_lever_to_json(following),
    }


def _show_ladder(run: "Run", planner: "Planner", arguments: argparse.Namespace, book: "PlanBook") -> None:
    from sparse_llama.cli import plan_report
    from sparse_llama.planning.plan import climb, ladder_to_json

    rungs = climb(run, planner)
    title = f"the ladder of levers: the longest row of each, micro-batches of {run.micro_batch_size}"
    book.columns(title, plan_report.LADDER_HEADER, plan_report.ladder_rows(rungs, planner))
    book.content["ladder"] = ladder_to_json(rungs, planner)
    if arguments.png is not None:
        from sparse_llama.reporting.ladder_png import save_ladder

        bars = [(f"{one.rung.number}  {one.rung.name}", one.longest.num_tokens) for one in rungs]
        save_ladder(bars, f"{run.name}: {plan_report.hardware_line(planner.hardware)}", arguments.png)
        book.wrote(arguments.png)
    if arguments.longest is not None:
        _write_longest(run, rungs, planner, arguments, book)


def _write_longest(
    run: "Run",
    rungs: "list[RungLength]",
    planner: "Planner",
    arguments: argparse.Namespace,
    book: "PlanBook",
) -> None:
    """Write the document of the settings that reach furthest, and say what they need."""
    from sparse_llama.cli import plan_report
    from sparse_llama.cli.plan_book import command_of_plan
    from sparse_llama.config.flags import Overrides
    from sparse_llama.config.run import load_run
    from sparse_llama.planning.document import changed_document, keys_of_longest, write_document
    from sparse_llama.planning.plan import make_plan, reach

    furthest = reach(rungs, planner)
    if furthest is None:
        raise ConfigError(
            f"{run.name}: no settings make even the shortest row fit; use a larger machine or a smaller base"
        )
    keys = keys_of_longest(run, furthest.lever, furthest.longest.num_tokens, planner.config)
    if "sparse_llama.model.rope_parameters" in keys:
        book.note(
            f"the base was made for {planner.config.max_position_embeddings:,} positions: the document has "
            "yarn's rope_parameters"
        )
    file = arguments.longest
    comments = {
        "_run": f"deepspeed launch/train.py --ds_config {file}",
        "_made_by": command_of_plan(),
        "_about": f"The longest row for {plan_report.hardware_line(planner.hardware)}: {furthest.rung.name}.",
    }
    write_document(file, changed_document(run.config_path, overrides(arguments), keys, comments=comments))
    flags = Overrides(output_dir=arguments.output_dir)
    found = load_run(file, flags, arguments.ranks, is_main=False, is_here=False)
    plan = make_plan(found, planner, None)
    book.wrote(file)
    book.table("the longest run", plan_report.run_rows(plan, planner))
    book.verdict(plan_report.verdict(plan, planner), is_good=plan.fits)


def _show_variants(arguments: argparse.Namespace, planner: "Planner", book: "PlanBook") -> None:
    """Show the plans of both adapters with both attentions, of which a document names one."""
    from dataclasses import replace

    from sparse_llama.cli import plan_report
    from sparse_llama.config.run import load_run
    from sparse_llama.planning.plan import make_plan, plan_to_json
    from sparse_llama.planning.quick import settle

    flags, rates = overrides(arguments), _rates(arguments, planner.hardware)
    plans: dict[str, Plan] = {}
    for adapter in ("v1", "v2"):
        for attention in ("dense", "sparse"):
            asked = replace(flags, adapter=adapter, attention=attention)
            run = load_run(arguments.ds_config, asked, arguments.ranks, is_main=False, is_here=False)
            run = settle(run, planner)
            plans[f"{adapter}, {attention}"] = make_plan(run, planner, rates)
    book.columns("variants", *plan_report.variant_table(plans))
    book.content["variants"] = [
        {"variant": name} | plan_to_json(plan, planner) for name, plan in plans.items()
    ]
