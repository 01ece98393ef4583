"""``launch/doctor.py``: can this machine run sparse-llama, correctly?"""

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_llama.cli.entry import is_main, world_size
from sparse_llama.cli.flags import Parser, make_room_for, parser
from sparse_llama.cli.results import split
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.status import Status

    from sparse_llama.doctor.checks import Check
    from sparse_llama.doctor.findings import Finding

    Found = dict[str, list[Finding]]

_SECTIONS = ("software", "devices", "memory", "ops", "launcher", "gradients")


def doctor_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/doctor.py``: how much is looked at, and where the report goes."""
    flags = parser(doc)
    add = flags.add_argument
    add("--skip_builds", action="store_true", help="compile nothing: say only whether it could be")
    add("--all_ops", action="store_true", help="compile and load what only a few runs need, too")
    add("--only", metavar="SECTION,...", help=f"of {', '.join(_SECTIONS)} (default: all)")
    add("--report", type=Path, metavar="FILE", help="write the text for a bug report there too")
    add("--json", type=Path, metavar="FILE", help="write what was found there, for programs")
    return flags


def doctor(arguments: argparse.Namespace) -> None:
    """Look at everything, print what was found, and say what it comes to.

    Raises:
        SystemExit: 1 where something is broken.
        ConfigError: a flag is wrong.
    """
    from sparse_llama.doctor.checks import checks

    chosen = _choose(checks(is_job=world_size() > 1), arguments.only)
    for flag in ("report", "json"):
        if is_main() and getattr(arguments, flag) is not None:
            make_room_for(f"--{flag}", getattr(arguments, flag))
    options = {"skip_builds": arguments.skip_builds, "all_ops": arguments.all_ops}
    found = _of_job(chosen, options) if world_size() > 1 else _look(chosen, options, {}, is_shown=True)
    if found is not None:
        _tell(found, arguments)


def _choose(every: "list[Check]", only: str | None) -> "list[Check]":
    if only is None:
        return every
    from sparse_llama.doctor.checks import SECTIONS

    sections: dict[str, str] = dict(zip(_SECTIONS, SECTIONS, strict=True))
    words = split(only)
    unknown = [word for word in words if word not in sections]
    if unknown or not words:
        raise ConfigError(
            f"--only: must be of {', '.join(_SECTIONS)}, with commas between them, got {only!a}"
        )
    wanted = {sections[word] for word in words}
    return [check for check in every if check.section in wanted]


def _of_job(every: "list[Check]", options: dict[str, bool]) -> "Found | None":
    """Return what all ranks have found, on the main one; None on the others, which have told it theirs."""
    from sparse_llama.distributed.ranks import device
    from sparse_llama.doctor.job import WORKER_ENVIRONMENT, Job, own_share

    job = Job(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    own = own_share(every, is_gpu=device().type == "cuda")
    found = _look(own, options, WORKER_ENVIRONMENT, is_shown=is_main())
    if not is_main():
        job.send(found)
        return None
    merged = job.merge(found)
    differing = {
        section: [one for one in rows if one not in found.get(section, [])]
        for section, rows in merged.items()
    }
    _show_others(differing)
    return merged


def _look(
    chosen: "list[Check]", options: dict[str, bool], environment: dict[str, str], *, is_shown: bool
) -> "Found":
    """Return what the checks find, by section; each section is shown when it is done."""
    from sparse_llama.doctor.examine import examine
    from sparse_llama.doctor.report import show_section
    from sparse_llama.reporting.tables import plain_console

    console = plain_console(is_quiet=not is_shown)
    found: Found = {}
    last = {check.section: check.name for check in chosen}
    waiting: AbstractContextManager[Status | None] = (
        console.status("starting ...") if console.is_terminal else nullcontext()
    )
    with waiting as status:

        def began(check: "Check") -> None:
            if status is not None:
                status.update(f"{check.section}: {check.name} ...")

        def noted(text: str) -> None:
            console.print(text, markup=False)

        for check, findings in examine(chosen, options, began=began, noted=noted, environment=environment):
            found.setdefault(check.section, []).extend(findings)
            if check.name == last[check.section]:
                show_section(check.section, found[check.section], console)
    return found


def _show_others(differing: "Found") -> None:
    from sparse_llama.doctor.report import show_section
    from sparse_llama.reporting.tables import plain_console

    rows = [one for findings in differing.values() for one in findings]
    if rows:
        show_section("what other ranks find otherwise", rows, plain_console())


def _tell(found: "Found", arguments: argparse.Namespace) -> None:
    from sparse_llama.doctor import report
    from sparse_llama.reporting.tables import plain_console

    console, text = plain_console(), report.to_text(found)
    is_bad = report.is_bad(found)
    console.print(report.verdict(found), style="bold red" if is_bad else "bold green", soft_wrap=True)
    print(f"\nFor a bug report, from here:\n----\n{text}----")
    if arguments.report is not None:
        arguments.report.write_text(text, encoding="utf-8")
    if arguments.json is not None:
        arguments.json.write_text(report.to_json(found), encoding="utf-8")
    if is_bad:
        raise SystemExit(1)
