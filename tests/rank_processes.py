"""Processes that tests start: their environment, and jobs of several, with the launcher and without."""

import json
import os
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
    started = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        printed = [process.communicate(timeout=timeout_s)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(printed)
    lines = [next(line for line in text.splitlines() if line.startswith("RESULT ")) for text in printed]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


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
