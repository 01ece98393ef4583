"""Small training jobs that tests of faults start, kill, and look at."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults.nursery import Nursery, Start
from safetensors.torch import load_file
from training.conftest import write_configuration

from sparse_llama.distributed.ranks import free_port
from sparse_llama.training.checkpoint import LATEST, list_checkpoints, newest_intact, step_of
from sparse_llama.training.durable import find_damage


class Jobs:
    """Starts jobs of one configuration in one output folder."""

    def __init__(
        self,
        nursery: Nursery,
        workplace: Path,
        folder: Path,
        changes: dict[str, Any],
        *words: str,
        ranks: int = 1,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output_dir, self.log = folder / "run", folder / "log"
        document = write_configuration(workplace, folder, changes)
        self._words = [
            "--ds_config",
            str(document),
            "--output_dir",
            str(self.output_dir),
            "--ignore_plan",
            *words,
        ]
        self._nursery, self._ranks = nursery, ranks
        self.processes: list[int] = []

    def start(self, *, words: tuple[str, ...] = (), **faults: Any) -> None:
        """Start every rank; the run goes on if there is one. The faults are those of the main rank."""
        begun = (
            ["--resume"] if newest_intact(self.checkpoints) else ["--overwrite"] * self.output_dir.exists()
        )
        start = Start([*self._words, *begun, *words], str(self.log))
        port = str(free_port())
        for rank in range(self._ranks):
            job = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self._ranks,
                "LOCAL_WORLD_SIZE": self._ranks,
            }
            environment = {name: str(value) for name, value in job.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            one = replace(start, environment=environment if self._ranks > 1 else {})
            self.processes.append(self._nursery.start(replace(one, **faults) if rank == 0 else one))

    def wait(self) -> list[int]:
        """Return the exit statuses; what goes wrong ends the others of the job as the launcher would."""
        statuses = [self._nursery.wait(self.processes.pop(0))]
        for process in self.processes:
            if statuses[0] != 0:
                time.sleep(1)
                os.kill(process, signal.SIGTERM)
            statuses.append(self._nursery.wait(process))
        self.processes.clear()
        return statuses

    def run(self, **options: Any) -> list[int]:
        self.start(**options)
        return self.wait()

    def kill(self) -> list[int]:
        for process in self.processes:
            os.kill(process, signal.SIGKILL)
        return self.wait()

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint by name, whole or not; 0 is none."""
        return max(map(step_of, list_checkpoints(self.checkpoints)), default=0)

    def damaged(self) -> list[str]:
        """Return the checkpoints that are not whole, and ``latest`` where it names none that is."""
        found = [path.name for path in list_checkpoints(self.checkpoints) if find_damage(path) is not None]
        latest = self.checkpoints / LATEST
        if latest.exists():
            named = self.checkpoints / latest.read_text(encoding="utf-8").strip()
            found += ["latest"] if find_damage(named) is not None else []
        return found

    def result(self) -> dict[str, Any]:
        """Return what must be the same of two runs that are one, to the bit."""
        lines = (self.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        curve = [
            (line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in map(json.loads, lines)
        ]
        validations = (self.output_dir / "validation.jsonl").read_text(encoding="utf-8")
        tensors = load_file(self.output_dir / "adapter" / "adapter.safetensors")
        bits = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        summary = json.loads((self.output_dir / "summary.json").read_text(encoding="utf-8"))
        sums = [summary[name] for name in ("train_loss", "tokens", "steps", "validation_loss")]
        return {"curve": repr(curve), "validations": validations, "adapter": bits, "sums": sums}
