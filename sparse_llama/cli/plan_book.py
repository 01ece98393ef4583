"""Where ``launch/plan_memory.py`` shows what it found, and keeps it for a JSON and a Markdown file."""

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sparse_llama.reporting.tables import plain_console, show_columns, show_table

if TYPE_CHECKING:
    from sparse_llama.benchmark.provenance import Provenance

SCRIPT = "launch/plan_memory.py"
_NOT_OF_THE_PLAN = ("--json", "--md", "--png")


@dataclass
class PlanBook:
    """Tables as they are shown, and the same as data."""

    console: Console = field(default_factory=plain_console)
    content: dict[str, Any] = field(default_factory=dict)
    """For the JSON file."""
    _pages: list[str] = field(default_factory=list)
    """Of the Markdown file."""

    def columns(self, title: str, header: list[str], rows: Iterable[list[str]]) -> None:
        """Show and keep a table with a header."""
        from sparse_llama.benchmark.report import markdown_table

        kept = list(rows)
        show_columns(title, header, kept, self.console)
        self._pages.append(f"## {_capital(title)}\n\n{markdown_table(header, kept).strip()}")

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Show and keep rows of label and value."""
        from sparse_llama.benchmark.report import markdown_table

        kept = list(rows)
        show_table(title, kept, self.console)
        self._pages.append(f"## {_capital(title)}\n\n{markdown_table(['', ''], map(list, kept)).strip()}")

    def note(self, text: str) -> None:
        """Show and keep a remark."""
        self.console.print(f"note: {text}", style="yellow")
        self._pages.append(f"Note: {text}.")

    def verdict(self, text: str, *, is_good: bool) -> None:
        """Show and keep whether something fits."""
        self.console.print(f"\n{text}\n", style="bold green" if is_good else "bold red")
        self._pages.append(f"**{_capital(text)}.**")

    def wrote(self, file: Path) -> None:
        """Say where a file is."""
        self.console.print(f"wrote {file}")

    def save_json(self, file: Path) -> None:
        """Write everything as JSON."""
        origin = {"provenance": asdict(_provenance())}
        file.write_text(json.dumps(origin | self.content, indent=2) + "\n", encoding="utf-8")
        self.wrote(file)

    def save_markdown(self, file: Path, title: str) -> None:
        """Write everything that was shown as Markdown."""
        origin = _provenance()
        plan = shlex.join(["python", SCRIPT, *sys.argv[1:]])
        versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
        head = (
            f"# Plan of {title}\n\nComputed, not measured: no GPU was used. `{plan}`\n\n"
            f"{origin.date}, commit {origin.git_commit}; {versions}"
        )
        file.write_text("\n\n".join([head, *self._pages]) + "\n", encoding="utf-8")
        self.wrote(file)


def command_of_plan() -> str:
    """Return the command that runs, without the files that it writes the plan to."""
    words = iter(sys.argv[1:])
    kept: list[str] = []
    for word in words:
        if word in _NOT_OF_THE_PLAN:
            next(words, None)
        else:
            kept.append(word)
    return shlex.join(["python", SCRIPT, *kept])


def _provenance() -> "Provenance":
    from sparse_llama.benchmark.provenance import provenance

    return provenance(SCRIPT, sys.argv[1:])


def _capital(text: str) -> str:
    """Return ``text`` as a sentence or a heading begins; names are left as they are."""
    return text if "_" in text.split()[0] else text[:1].upper() + text[1:]
