"""The ranks of a job as forks of one process that has imported what takes 5 s, instead of each for itself.

    python tests/forked_ranks.py NUM_RANKS SCRIPT [ARGUMENT ...]

Each line that a rank prints has its number in front. Ends with status 1 if any rank did not end with 0.
"""

import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path


def fork_rank(rank: int, script: str, arguments: list[str], printed: Path) -> int:
    """Return the process of a rank that runs ``script`` and prints to a file."""
    process = os.fork()
    if process:
        return process
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    out = os.open(printed, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = [script, *arguments]
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(num_ranks: int, script: str, *arguments: str) -> int:
    """Return 0 if every rank does."""
    import deepspeed  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(num_ranks)]
        ranks = [fork_rank(rank, script, list(arguments), file) for rank, file in enumerate(files)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
        for rank, file in enumerate(files):
            for line in file.read_text(encoding="utf-8").splitlines():
                print(f"{rank}: {line}")
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
