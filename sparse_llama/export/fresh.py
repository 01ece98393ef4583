"""A process of its own that opens an export with plain transformers, as its users will.

In the exporter's own process an export may open because of what else is imported there.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sparse_llama.errors import ExportError
from sparse_llama.export import reopen

_MAX_SHOWN = 300  # characters of an error that a message repeats


def measure_elsewhere(
    folder: Path, job: dict[str, torch.Tensor], options: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Return what ``reopen.measure_folder`` returns in a new process, offline.

    The code of the folder is copied, as transformers does, to a place that is gone afterwards.

    Raises:
        ExportError: the folder does not open there, or opening it needs this package.
    """
    with tempfile.TemporaryDirectory(prefix="sparse_llama_export_") as place:
        job_file, result_file = Path(place, "job.safetensors"), Path(place, "result.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in job.items()}, job_file, metadata=options)
        modules = os.path.join(place, "modules")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        done = subprocess.run(
            # -P: the program's own folder is not searched for modules
            [sys.executable, "-P", reopen.__file__, folder, job_file, result_file],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            raise ExportError(
                "the exported model does not open in a process of its own, with plain transformers "
                f"({_reason(done)}); nothing was written"
            )
        return {name: tensor.clone() for name, tensor in load_file(result_file).items()}


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}; SIGKILL is what too little memory ends in"
    lines = done.stderr.strip().splitlines()
    starts = [index for index, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
    message = " ".join(" ".join(lines[starts[-1] if starts else -1 :]).split())
    return message[:_MAX_SHOWN] or f"exit status {done.returncode}"
