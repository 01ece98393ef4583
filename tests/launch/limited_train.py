"""``launch/train.py`` in a process that may take so many MiB beyond what Python and its libraries take."""

import runpy
import sys
from pathlib import Path

from sparse_llama import cli
from sparse_llama.config.run import load_run
from sparse_llama.distributed import ranks
from sparse_llama.training import loop  # noqa: F401
from sparse_llama.training.host_memory import limit_private
from sparse_llama.training.libraries import load_libraries

SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"

if __name__ == "__main__":
    extra_mib, *words = sys.argv[1:]
    if "--retry" not in words:  # a retry has the limit already
        arguments = cli.train_parser(None).parse_args(words)
        load_libraries(load_run(arguments.ds_config, cli.overrides(arguments), 1))
        ranks.initialize()
        limit_private(int(extra_mib) * 2**20)
    sys.argv = [sys.argv[0], *words]
    runpy.run_path(str(SCRIPT), run_name="__main__")
