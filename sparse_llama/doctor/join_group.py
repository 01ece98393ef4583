"""A rank that joins the process group of its job, and adds one number up with all others.

    deepspeed --module sparse_llama.doctor.join_group FILE

The first rank leaves in FILE how many ranks there were and what the sum over their numbers, from 1, was.
"""

import json
import sys
from pathlib import Path

import torch

from sparse_llama.distributed import ranks


def main(file: Path) -> None:
    """Join, add up, and leave the group."""
    ranks.initialize()
    try:
        own = torch.tensor(ranks.rank() + 1.0, device=ranks.device())
        total = float(ranks.all_reduce_sum(own))
        if ranks.is_main():
            file.write_text(json.dumps({"ranks": ranks.world_size(), "sum": total}), encoding="utf-8")
    finally:
        ranks.finalize()


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--local"))))
