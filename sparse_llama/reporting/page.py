"""A report as one structure, written as Markdown and as one HTML file that needs nothing else."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; --text: #1f2328; --back: #ffffff;
  --dim: #59636e; --link: #0969da }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --soft: #151b23; --text: #f0f6fc; --back: #0d1117; --dim: #9198a1;
    --link: #4493f8 }
}
body { margin: 2rem auto; max-width: 70rem; padding: 0 1.5rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.7rem }
h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem }
a { color: var(--link) }
td a { color: inherit; text-decoration: none; border-bottom: 1px dotted var(--dim) }
td:first-child { white-space: nowrap }
p, figcaption { max-width: 50rem } figcaption, .dim { color: var(--dim); font-size: .9rem }
figure { margin: 1.2rem 0 } figure img { max-width: 100%; background: #ffffff; border-radius: 6px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .8rem; text-align: right; vertical-align: top }
th { background: var(--soft) } th:first-child, td:first-child, .text td, .text th { text-align: left }
code, pre { font: .88em ui-monospace, SFMono-Regular, Menlo, monospace; background: var(--soft);
  border-radius: 4px }
code { padding: .1em .3em } pre { padding: .8rem; overflow-x: auto }
"""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str


@dataclass(frozen=True)
class Code:
    """Command lines."""

    lines: str


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and where it is from."""

    words: str
    link: str | None = None
    """Relative to the report."""


@dataclass(frozen=True)
class Grid:
    """A table with a header line; its first column names the rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    is_text: bool = False
    """Whether the cells are sentences, which begin on the left, not numbers."""


@dataclass(frozen=True)
class Picture:
    """A PNG beside the report; in HTML it is in the file."""

    file: Path
    words: str
    """What it shows."""


Block = Text | Code | Grid | Picture


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report: what stands before the first heading, and its sections."""

    title: str
    opening: Sequence[Block]
    sections: Sequence[Section]


def to_markdown(page: Page) -> str:
    """Return the page as Markdown; pictures and links are relative to the file it is written to."""
    parts = [f"# {page.title}", *map(_markdown, page.opening)]
    for section in page.sections:
        parts += [f"## {section.title}", *map(_markdown, section.blocks)]
    return "\n\n".join(parts) + "\n"


def to_html(page: Page) -> str:
    """Return the page as one file: pictures and style are inside, and it loads nothing."""
    body = [f"<h1>{html.escape(page.title)}</h1>", *map(_html, page.opening)]
    for section in page.sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", *map(_html, section.blocks)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case Text(words):
            return words
        case Code(lines):
            return f"```\n{lines}\n```"
        case Picture(file, words):
            return f"![{_bare(words)}]({file.name})\n\n{words}"
        case Grid(header, rows, _):
            lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
            lines += ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in rows]
            return "\n".join(lines)


def _markdown_cell(cell: str | Cell) -> str:
    words = cell if isinstance(cell, str) else cell.words
    text = " ".join(words.split()).replace("|", "\\|")
    if isinstance(cell, Cell) and cell.link is not None and text:
        return f"[{text}]({cell.link})"
    return text


def _bare(words: str) -> str:
    return words.replace("[", "(").replace("]", ")").split(".")[0]


def _html(block: Block) -> str:
    match block:
        case Text(words):
            return f"<p>{_inline(words)}</p>"
        case Code(lines):
            return f"<pre>{html.escape(lines)}</pre>"
        case Picture(file, words):
            data = base64.b64encode(file.read_bytes()).decode()
            caption = html.escape(words)
            return (
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        case Grid(header, rows, is_text):
            kind = ' class="text"' if is_text else ""
            head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
            body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>\n" for row in rows)
            return (
                f'<div class="scroll"><table{kind}>\n<thead><tr>{head}</tr></thead>\n'
                f"<tbody>{body}</tbody></table></div>"
            )


def _html_cell(cell: str | Cell) -> str:
    words = cell if isinstance(cell, str) else cell.words
    text = _inline(words)
    if isinstance(cell, Cell) and cell.link is not None:
        text = f'<a href="{html.escape(cell.link, quote=True)}">{text}</a>'
    return f"<td>{text}</td>"


def _inline(words: str) -> str:
    """Return text as HTML, with what stands between backticks as code."""
    pieces = html.escape(words).split("`")
    if len(pieces) % 2 == 0:  # a backtick without another
        return html.escape(words)
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))
