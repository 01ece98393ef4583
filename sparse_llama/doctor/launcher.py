"""Does DeepSpeed's launcher start processes here, and do they find each other?"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sparse_llama.distributed import ranks
from sparse_llama.distributed.ranks import device, environment_without_job, free_port
from sparse_llama.doctor.commands import last_line, telling_line
from sparse_llama.doctor.findings import Finding
from sparse_llama.doctor.processes import end_session
from sparse_llama.planning.probe import launcher_command
from sparse_llama.reporting.tables import format_seconds, format_step

LIMIT_S = 180.0
"""Of one start. The slowest that was seen, on one busy core, takes 40 s."""
_MODULE = "sparse_llama.doctor.join_group"
_ROOT = Path(__file__).parents[2]


def check_launcher(num_ranks: int, *, limit_s: float = LIMIT_S) -> Finding:
    """Return whether ``num_ranks`` processes start and all-reduce a number: one by the command that users
    type, several by what that runs."""
    name = f"deepspeed, {num_ranks} process{'es' if num_ranks > 1 else ''}"
    if num_ranks > places():
        return Finding(name, "none", f"room for {places()} here: one for each core or GPU")
    command = launcher_command(num_ranks) if num_ranks > 1 else _typed()
    if command is None:
        advice = "activate the environment that DeepSpeed is installed in, or reinstall it"
        return Finding(name, "fail", "no command deepspeed beside this Python, nor on PATH", advice)
    return _start(name, command, num_ranks, limit_s)


def places() -> int:
    """Return the processes that would each have a core, or a GPU, of their own."""
    return torch.cuda.device_count() if device().type == "cuda" else len(os.sched_getaffinity(0))


def check_job() -> Finding:
    """Return whether all ranks of this process' job all-reduce a number. Every rank calls it."""
    num_ranks = ranks.world_size()
    started = time.monotonic()
    ranks.initialize()
    total = float(ranks.all_reduce_sum(torch.tensor(ranks.rank() + 1.0, device=device())))
    ranks.finalize()
    return _judge(f"this job, {num_ranks} ranks", num_ranks, total, time.monotonic() - started)


def _typed() -> list[str] | None:
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        return None
    # no hostfile: there may be one in its usual place, and this is about this machine
    options = ["--num_gpus", "1", "--hostfile", "none", "--master_port", str(free_port())]
    return [sys.executable, found, *options]


def _start(name: str, command: list[str], num_ranks: int, limit_s: float) -> Finding:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "sum.json"), Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--module", _MODULE, str(result)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end_session(process.pid)
                process.wait()
        said = log.read_text(encoding="utf-8", errors="replace")
        if status is None:
            told = f"not done after {format_seconds(limit_s)}; its last words: {last_line(said)}"
            return Finding(name, "fail", told, _ADVICE)
        if status != 0 or not result.is_file():
            return Finding(name, "fail", f"exit status {status}: {telling_line(said)}", _ADVICE)
        found = json.loads(result.read_text(encoding="utf-8"))
    took_s = time.monotonic() - started
    if found["ranks"] != num_ranks:
        return Finding(name, "fail", f"{found['ranks']} processes joined instead of {num_ranks}", _ADVICE)
    return _judge(name, num_ranks, found["sum"], took_s)


def _judge(name: str, num_ranks: int, total: float, took_s: float) -> Finding:
    expected = num_ranks * (num_ranks + 1) / 2
    if total != expected:
        return Finding(name, "fail", f"their numbers add up to {total:g}, not to {expected:g}", _ADVICE)
    return Finding(name, "ok", f"joined and added up a number in {format_step(took_s)}", varies=True)


def _environment() -> dict[str, str]:
    """Return the environment of a job of its own that finds this very package."""
    environment = environment_without_job()
    paths = [str(_ROOT), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


_ADVICE = "a firewall, a VPN or an odd /etc/hosts between local processes? NCCL_DEBUG=INFO tells more on GPUs"
