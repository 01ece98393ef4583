"""Words of other programs: what they print, and which line of it says what went wrong."""

import re
import subprocess

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NOISE = re.compile(r"\[WARNING\] \[real_accelerator\.py")  # said at every import on a CPU
_LAUNCHERS_OWN = re.compile(r"\[20\d\d-")  # a line of DeepSpeed's logger begins with the date
_TELLING = (
    re.compile(r"\b(fatal )?error: ", re.IGNORECASE),  # compilers, and this project's commands
    re.compile(r"^(\w+\.)*\w+(Error|Exception)\b"),  # the end of a traceback
    re.compile(r"\berror\b|cannot find|not found|no such file", re.IGNORECASE),
)
_LONGEST = 300


def ask(*command: str, limit_s: float = 20) -> str | None:
    """Return the first line that a program prints; None where there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def telling_line(text: str) -> str:
    """Return the line of an output that says most of what went wrong; the last one where none says so."""
    lines = _lines(text)
    for pattern in _TELLING:
        telling = [line for line in lines if pattern.search(line)]
        if telling:
            return shorten(telling[0])
    return last_line(text)


def last_line(text: str) -> str:
    """Return the last line of an error's message or of an output."""
    lines = _lines(text)
    return shorten(lines[-1]) if lines else "no word"


def _lines(text: str) -> list[str]:
    """Return the lines that say something, without colours; those of DeepSpeed's logger if there are no
    others."""
    lines = [line.strip() for line in _ESCAPES.sub("", text).splitlines() if line.strip()]
    lines = [line for line in lines if not _NOISE.search(line)]
    return [line for line in lines if not _LAUNCHERS_OWN.match(line)] or lines


def shorten(line: str, longest: int = _LONGEST) -> str:
    """Return a line of at most ``longest`` characters."""
    return line if len(line) <= longest else f"{line[: longest - 4]} ..."
