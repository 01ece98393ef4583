"""Real steps of a run at each ZeRO stage, offload and length, every one in a fresh process: what they take.

A cell of the table is a process of its own under DeepSpeed's launcher (``planning.probe_cell``): memory that
one would leave behind - the allocator's, a library's, a process group's - would be the next one's.
"""

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from sparse_llama.config.flags import Overrides
from sparse_llama.config.run import Run, load_run
from sparse_llama.distributed.ranks import environment_without_job, free_port
from sparse_llama.errors import ConfigError
from sparse_llama.training.metrics import write_json

FITS, OUT_OF_MEMORY, NOT_APPLICABLE, CRASHED = "fits", "out of memory", "not applicable", "crashed"
Status = Literal["fits", "out of memory", "not applicable", "crashed"]
_MEASURED = "sparse_llama.planning.probe_cell"


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    zero_stage: int
    offload: str
    num_tokens: int

    @property
    def name(self) -> str:
        return f"stage_{self.zero_stage}_{self.offload}_{self.num_tokens}"


@dataclass(frozen=True)
class Figures:
    """What the steps of a cell took on one rank, or the most on any."""

    peak_gpu_bytes: int
    """Allocated; 0 without a GPU."""
    peak_gpu_reserved_bytes: int
    peak_host_bytes: int
    """Resident, the whole process."""
    peak_tensor_bytes: int
    """Of a step on the CPU: what PyTorch's allocator had given out, without what the C library keeps of freed
    tensors below 32 MiB; 0 on a GPU, and where there was no room to find out, or nobody asked."""
    libraries_bytes: int
    """Resident before the model was there: Python, torch, DeepSpeed. In ``peak_host_bytes``, in no budget."""
    step_s: float
    """Of an optimizer step of the run, after the first: measured micro-batches times their number."""

    @property
    def peak_run_bytes(self) -> int:
        """Host memory beyond the libraries'."""
        return self.peak_host_bytes - self.libraries_bytes


@dataclass(frozen=True)
class Outcome:
    """What came of a cell."""

    status: Status
    reason: str = ""
    """Why it does not apply, where memory ran out, or the error's last line."""
    figures: Figures | None = None
    planned_bytes: dict[str, int] | None = None
    """The plan's peak by place, without the libraries."""

    @property
    def fits(self) -> bool:
        return self.status == FITS

    @classmethod
    def of_json(cls, entry: Mapping[str, Any]) -> Self:
        """Return the outcome of which ``asdict`` is in ``entry``."""
        figures = None if entry["figures"] is None else Figures(**entry["figures"])
        return cls(entry["status"], entry["reason"], figures, entry["planned_bytes"])


@dataclass
class Probe:
    """The measurements of one run, kept in ``output_dir/probe.json`` as they come."""

    config_path: Path | None
    overrides: Overrides
    """Of the run; stage, offload and length are each cell's own."""
    output_dir: Path
    budget_bytes: int | None
    """Of each GPU, or of this process beyond its libraries; None is what there is."""
    num_steps: int = 2
    counts_tensors: bool = True
    """Whether one more step is taken for ``peak_tensor_bytes``: PyTorch's record of a step, gigabytes of
    tens of thousands of tokens in tiles."""
    num_ranks: int = 1
    stretched_from: int | None = None
    """Rows longer than this get their positions stretched, which takes no memory; None leaves them as they
    are."""
    outcomes: dict[Cell, Outcome] = field(default_factory=dict)
    longest: dict[tuple[int, str], int] = field(default_factory=dict)
    """Longest row that fits, by stage and offload."""

    @property
    def file(self) -> Path:
        return self.output_dir / "probe.json"

    def run_of(self, cell: Cell) -> Run:
        """Return the run that a cell measures.

        Raises:
            ConfigError: there is no such stage with such an offload, here or at all.
        """
        return load_run(self.config_path, self.overrides_of(cell), self.num_ranks, is_main=False)

    def overrides_of(self, cell: Cell) -> Overrides:
        """Return the run's flags with the cell's own."""
        own = {field.name: getattr(self.overrides, field.name) for field in fields(Overrides)}
        own |= {"zero_stage": cell.zero_stage, "offload": cell.offload, "seq_length": cell.num_tokens}
        if cell.offload != "nvme" and self.overrides.checkpointing != "nvme":
            own["nvme_path"] = None  # without anything to put there it is refused
        if self.stretched_from is not None and cell.num_tokens > self.stretched_from:
            own["rope"] = "linear"
        return Overrides(**own)

    def resume(self, identity: Mapping[str, Any]) -> int:
        """Take over what an earlier call has finished; return how many cells that is.

        Raises:
            ConfigError: the file holds another run's.
        """
        self._identity = json.loads(json.dumps(identity, default=str))
        saved = read_saved(self.file, self._identity)
        for entry in saved["cells"]:
            cell = Cell(entry["zero_stage"], entry["offload"], entry["num_tokens"])
            self.outcomes[cell] = Outcome.of_json(entry)
        return len(self.outcomes)

    def keep(self, cell: Cell, outcome: Outcome) -> None:
        """Take a cell's outcome into the table and the file."""
        self.outcomes[cell] = outcome
        self.save()

    def save(self) -> None:
        """Write the file."""
        content = {
            "identity": self._identity,
            "cells": [asdict(cell) | asdict(outcome) for cell, outcome in self.outcomes.items()],
            "longest": [
                {"zero_stage": stage, "offload": offload, "num_tokens": length}
                for (stage, offload), length in self.longest.items()
            ],
        }
        write_json(self.file, content)


def read_saved(file: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measurements that an earlier call has left in ``file``, none where there is no file.

    Args:
        identity: what two calls must have in common for one to go on where the other stopped.

    Raises:
        ConfigError: the file cannot be read, or its measurements are of something else.
    """
    if not file.is_file():
        return {"cells": [], "longest": []}
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        found, _ = saved["identity"], saved["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: no readable measurements ({type(error).__name__}: {error}); start anew with "
            "--overwrite, or name another folder with --output_dir"
        ) from None
    if found != identity:
        differing = ", ".join(sorted(key for key in identity if found.get(key) != identity[key]))
        raise ConfigError(
            f"{file}: holds measurements of another run (other {differing}); start anew with --overwrite, or "
            "name another folder with --output_dir"
        )
    return saved


def measure(probe: Probe, cell: Cell) -> Outcome:
    """Return what the steps of ``cell`` take, from a process for each rank; whatever ends them is an
    outcome."""
    try:
        probe.run_of(cell)
    except ConfigError as error:
        return Outcome(NOT_APPLICABLE, _short(str(error), probe.config_path))
    return run_module(_MEASURED, cell.name, probe.output_dir / "cells", _order(probe, cell), probe.num_ranks)


def run_module(module: str, name: str, folder: Path, order: Mapping[str, Any], num_ranks: int) -> Outcome:
    """Return what ``num_ranks`` processes of a ``module`` find; whatever ends them is an outcome.

    Args:
        name: of the order, the results and the log that are left in ``folder``.
        order: what the module is to measure; where each rank leaves its outcome is added as ``results``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"{name}_rank{rank}.json" for rank in range(num_ranks)]
    for path in results:
        path.unlink(missing_ok=True)
    file, log = folder / f"{name}.json", folder / f"{name}.log"
    file.write_text(json.dumps({**order, "results": [str(path) for path in results]}), encoding="utf-8")
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.run(
            [*launcher_command(num_ranks), "--module", module, str(file)],
            env=environment_without_job(),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    found = [json.loads(path.read_text(encoding="utf-8")) for path in results if path.is_file()]
    failed = next((one for one in found if one["status"] != FITS), None)
    if failed is not None:
        return Outcome(failed["status"], failed["reason"])
    if _signal(status) == signal.SIGKILL:
        return Outcome(OUT_OF_MEMORY, "killed, as Linux does when host memory runs out")
    if len(found) < len(results):
        return Outcome(CRASHED, f"{_last_line(log, status)}; see {log}")
    every = [Figures(**one["figures"]) for one in found]
    most = {item.name: max(getattr(one, item.name) for one in every) for item in fields(Figures)}
    return Outcome(FITS, figures=Figures(**most))


def launcher_command(num_ranks: int) -> list[str]:
    """Return the words that start ``num_ranks`` processes on this machine: what ``deepspeed`` itself runs,
    after it has imported all of DeepSpeed once more."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = [int(word) for word in visible.split(",") if word.strip().isdigit()] or list(range(num_ranks))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": numbers[:num_ranks]}).encode()).decode()
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch"),
        *(f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"),
    ]


def _order(probe: Probe, cell: Cell) -> dict[str, Any]:
    return {
        "config_path": None if probe.config_path is None else str(probe.config_path),
        "overrides": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(probe.overrides_of(cell)).items()
            if value is not None
        },
        "budget_bytes": probe.budget_bytes,
        "num_steps": probe.num_steps,
        "counts_tensors": probe.counts_tensors,
    }


def _short(message: str, config_path: Path | None) -> str:
    """Return a refusal without the document's name, which every cell has in common."""
    label = "the embedded cpu_demo.json" if config_path is None else str(config_path)
    return message.removeprefix(f"{label}: ")


def _signal(status: int) -> int | None:
    """Return the signal that ended a process of the launcher's, which exits with its negative."""
    if status < 0:
        return -status
    return 256 - status if status > 192 else None


def _last_line(log: Path, status: int) -> str:
    """Return the last line that is not the launcher's own."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    own = [line for line in lines if line and not line.startswith("[20")]
    ended = f"exit status {status}" if _signal(status) is None else f"ended by signal {_signal(status)}"
    return f"{ended}: {own[-1]}" if own else ended
