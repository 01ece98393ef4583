"""What each rank makes of ``head_groups`` "auto" where the main rank alone finds that only groups fit."""

import json
from functools import partial
from pathlib import Path

from shipped_runs import estimator

from sparse_llama.cli import training
from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.distributed import ranks
from sparse_llama.planning import hardware, search


def needs(run: Run) -> dict[str, int]:
    return {"host": 200 if run.settings.memory.head_groups is None else 100}


def main() -> None:
    flags = Overrides(output_dir=Path("nowhere"), head_groups="auto")
    run = load_run(None, flags, ranks.world_size(), is_main=False)
    if ranks.is_main():
        search.Planner = partial(search.Planner, estimator=estimator(needs))
        hardware.this_machine = lambda: hardware.Hardware(None, host_bytes=2 * 150)  # for two ranks
    settled = training._planned(run, is_refused=True)
    print("RESULT", json.dumps(settled.settings.memory.head_groups), flush=True)
    ranks.finalize()


if __name__ == "__main__":
    main()
