"""Processes that are ended with all that they have started."""

import os
import signal
from pathlib import Path


def end_session(leader: int) -> None:
    """Kill every process of the session that ``leader`` began, itself among them.

    Not its process group alone: ninja gives each compiler a group of its own, which would go on.
    """
    for process in _members(leader):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _members(leader: int) -> list[int]:
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
        except (ProcessLookupError, PermissionError):
            continue
    return found
