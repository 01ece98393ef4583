"""Words of other programs: what they print, and which line of it says what went wrong."""

import re
import subprocess

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TELLING = re.compile(r"\berror\b|cannot find|not found|no such file", re.IGNORECASE)
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
    """Return the line of an output that says most: the first that names an error, or the last one."""
    plain = _ESCAPES.sub("", text)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)]
    return shorten((telling or lines or ["no word"])[0 if telling else -1])


def last_line(text: str) -> str:
    """Return the last line of an error's message or of an output."""
    lines = [line.strip() for line in _ESCAPES.sub("", text).splitlines() if line.strip()]
    return shorten(lines[-1]) if lines else "no word"


def shorten(line: str, longest: int = _LONGEST) -> str:
    """Return a line of at most ``longest`` characters."""
    return line if len(line) <= longest else f"{line[: longest - 4]} ..."
