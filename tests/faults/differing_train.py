"""``launch/train.py`` of a job whose rank 1 has another configuration, or other data, than rank 0."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"


def read_other_records() -> None:
    """Have this process find one letter changed in a record."""
    from dataclasses import replace

    from sparse_llama.data import prepare

    read = prepare.read_examples

    def changed(*arguments: Any) -> Any:
        training, held_out = read(*arguments)
        first = training[0]
        turns = tuple(replace(turn, response=turn.response + "!") for turn in first.turns)
        return [replace(first, turns=turns), *training[1:]], held_out

    prepare.read_examples = changed


if __name__ == "__main__":
    words = sys.argv[1:]
    place = words.index("--other")
    other = words[place + 1]
    del words[place : place + 2]
    if os.environ["RANK"] == "1" and other == "data":
        read_other_records()
    elif os.environ["RANK"] == "1":
        words[words.index("--ds_config") + 1] = other
    sys.argv = [str(SCRIPT), *words]
    runpy.run_path(str(SCRIPT), run_name="__main__")
