"""Processes that tests start: their environment, and jobs of several, with the launcher and without."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from sparse_llama.distributed.ranks import environment_without_job, free_port

ROOT = Path(__file__).parents[1]


def process_environment(**own: str) -> dict[str, str]:
    """Return the environment of a process that a test starts: of no job that the test itself may be in, one
    thread, and this checkout and its tests to import from."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return environment_without_job() | shared | own


def run_ranks(script: Path, processes: int, *arguments: str, timeout_s: int = 400) -> list[Any]:
    """Return what every process of ``script`` printed after "RESULT ", as JSON, by rank."""
    environment = process_environment(
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    started = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "forked_ranks.py"), str(processes), str(script), *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = started.communicate(timeout=timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)  # its ranks too
    assert started.returncode == 0, output
    printed = [line.split(": ", 1) for line in output.splitlines() if ": RESULT " in line]
    found = {int(rank): json.loads(text.removeprefix("RESULT ")) for rank, text in printed}
    return [found[rank] for rank in range(processes)]


def launch(script: Path, processes: int, *arguments: str, timeout_s: int = 400) -> str:
    """Run ``script`` under the ``deepspeed`` launcher and return what it printed."""
    command = [sys.executable, Path(sys.executable).with_name("deepspeed")]
    options = ["--master_port", str(free_port()), "--num_gpus", str(processes)]
    done = subprocess.run(
        [*command, *options, str(script), *arguments],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
