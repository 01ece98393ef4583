"""Two runs in one start of a job, which takes DeepSpeed seconds: ``fit``, then ``launch/train.py`` itself."""

import json
import runpy
import sys
from pathlib import Path

from sparse_llama import cli
from sparse_llama.config.run import load_run
from sparse_llama.training.loop import fit

SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"

if __name__ == "__main__":
    first, second = (json.loads(argument) for argument in sys.argv[-2:])
    arguments = cli.train_parser(None).parse_args(first)
    fit(load_run(arguments.ds_config, cli.overrides(arguments), cli.world_size(), is_main=cli.is_main()))
    sys.argv = [str(SCRIPT), *second]
    runpy.run_path(str(SCRIPT), run_name="__main__")
