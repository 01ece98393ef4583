"""Where every command begins: a mistake is one line, printed once, with exit status 2; memory that ran out is
a few lines, with exit status 3.

Which process speaks is read from the launcher's environment: nothing here imports torch.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from sparse_llama.errors import OutOfMemoryError, RankLostError, SparseLlamaError, StoppedError

MAIN_SPEAKS_WITHIN_S = 10
MOST_CHARACTERS = 1000
"""Of a mistake's line."""


def main(
    call: Callable[[argparse.Namespace], object],
    flags: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse the command line and make the ``call``; a user's mistake ends the process with one line and
    status 2.

    Raises:
        SystemExit: 2 after a mistake, 3 after memory ran out, 4 after a run was stopped and has saved, 1
        after another rank has ended, 130 after Ctrl-C; every other exception is ours and keeps its traceback.
    """
    try:
        call(flags.parse_args(argv))
    except SparseLlamaError as error:
        _tell_error(error)
        raise SystemExit(error.exit_status) from None
    except BrokenPipeError:  # "| head" has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so once more at exit
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        if is_main():
            tell("interrupted")
        raise SystemExit(130) from None


def is_main() -> bool:
    """Return whether this process is the one of the job that prints, going by the launcher's environment
    alone."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def world_size() -> int:
    """Return the number of processes of the job, going by the launcher's environment alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _tell_error(error: SparseLlamaError) -> None:
    if isinstance(error, StoppedError):
        if is_main():
            tell(str(error), kind="stopped")
    elif isinstance(error, RankLostError):
        # The launcher ends the others within a second. The main rank may be the one that has ended: then the
        # next one speaks.
        if os.environ.get("RANK", "0") in ("0", "1"):
            tell(f"rank {os.environ.get('RANK')}: {error}", waits=False)
    else:
        tell(str(error), is_one_line=not isinstance(error, OutOfMemoryError))


def tell(message: str, *, is_one_line: bool = True, kind: str = "error", waits: bool = True) -> None:
    """Print a mistake on standard error, as one line unless told otherwise; other ranks leave the word to the
    main one first, unless this one does not wait."""
    line = f"{kind}: " + (_in_one_line(message) if is_one_line else message)
    if not is_main() and waits:
        # The launcher ends the job when the first rank ends: the main one, which says the same, must be it.
        # Still here after that, this rank is the only one with the mistake.
        time.sleep(MAIN_SPEAKS_WITHIN_S)
        line += f" (rank {os.environ.get('RANK')})"
    print(line, file=sys.stderr, flush=True)


def _in_one_line(message: str) -> str:
    """Return ``message`` without line breaks, what a terminal would obey, and the middle of what is too long:
    names of a thousand characters are repeated from flags and files."""
    line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in " ".join(message.split()))
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS // 2]} ... {line[-300:]}"
