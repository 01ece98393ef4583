"""What was found: tables for who sits here, a block of plain text and JSON for everybody else."""

import getpass
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_llama.config import paths
from sparse_llama.doctor.checks import SECTIONS
from sparse_llama.doctor.findings import Finding, Status, count

Found = Mapping[str, list[Finding]]
"""Rows by section."""
_WORDS: dict[Status, str] = {"ok": "ok", "warn": "look", "fail": "FAIL", "none": "-"}
_COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red", "none": "dim"}
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_TOKEN = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|wandb_)[A-Za-z0-9_-]{8,}")
_SHORTEST_SECRET = 6


def show_section(title: str, findings: list[Finding], console: Console) -> None:
    """Print one section: a row for each finding, and below it what is to be done."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for one in findings:
        colour = _COLOURS[one.status]
        told = Text(one.found, style="dim" if one.status == "none" else "")
        if one.advice:
            told.append(f"\n-> {one.advice}", style=colour)
        table.add_row(Text(_WORDS[one.status], style=colour), Text(one.name), told)
    console.print(table)


def verdict(found: Found) -> str:
    """Return what all of it comes to, in a line."""
    every = [one for findings in found.values() for one in findings]
    failed = [one.name for one in every if one.status == "fail"]
    num_to_look_at = count(every, "warn")
    look = f"{num_to_look_at} thing{'s' if num_to_look_at > 1 else ''} to look at"
    tail = f"; {look}" if num_to_look_at else ""
    if failed:
        return f"This machine cannot run sparse-llama correctly as it is: {', '.join(failed)}{tail}."
    if set(SECTIONS) - set(found):
        return f"Nothing is broken in what was looked at ({', '.join(found)}){tail}."
    return f"This machine can run sparse-llama{tail}."


def is_bad(found: Found) -> bool:
    """Return whether anything is red."""
    return any(count(findings, "fail") for findings in found.values())


def to_text(found: Found) -> str:
    """Return a block of plain text to paste: without names of users, secrets, or where a home folder is."""
    lines = [verdict(found)]
    width = max((len(one.name) for findings in found.values() for one in findings), default=0)
    for section, findings in found.items():
        lines.append(f"[{section}]")
        for one in findings:
            advice = f" -> {one.advice}" if one.advice else ""
            lines.append(f"{_WORDS[one.status]:<4}  {one.name:<{width}}  {one.found}{advice}")
    return without_secrets("\n".join(lines)) + "\n"


def to_json(found: Found) -> str:
    """Return the same for programs."""
    document: dict[str, Any] = {
        "verdict": verdict(found),
        "is_bad": is_bad(found),
        "sections": {
            section: [
                {"name": one.name, "status": one.status}
                | {"found": without_secrets(one.found), "advice": without_secrets(one.advice)}
                for one in findings
            ]
            for section, findings in found.items()
        },
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def without_secrets(text: str) -> str:
    """Return ``text`` without what nobody else should read: values of this process' environment that are
    secrets by name, tokens by their look, the home folder, and the user's name."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    text = paths.without_secrets(_TOKEN.sub("***", text))  # of addresses: a package index, a proxy
    for home in sorted({str(Path.home()), os.path.realpath(Path.home())}, key=len, reverse=True):
        if home != "/":
            text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    user = _user()
    if user and user != "root":  # whose name says nothing, and is a word
        text = re.sub(rf"(?<=/){re.escape(user)}(?![\w-])", "USER", text)  # in a path: it may be a word
    return text


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in many containers
        return None
