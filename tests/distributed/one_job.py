"""A job that sums through DeepSpeed's shared memory, and compares what its ranks are about to do."""

import json
import os
from pathlib import Path
from typing import Any

import deepspeed.comm
import torch

from sparse_llama.distributed import ranks
from sparse_llama.distributed.agreement import check_agreement, fingerprint
from sparse_llama.errors import ConfigError


def sums() -> list[Any]:
    """Return what was summed, and what the job's port has a name for meanwhile."""
    total = torch.full((4096,), ranks.rank() + 1.0)
    deepspeed.comm.inference_all_reduce(total)  # through the shared memory; all_reduce is gloo's
    ranks.barrier()
    named = [one.name for one in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")]
    return [total.unique().tolist(), named]


def disagreement(parts: dict[str, Any]) -> str | None:
    try:
        check_agreement(lambda: parts)
    except ConfigError as error:
        return str(error)
    return None


def main() -> None:
    os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]  # all on this machine, as the launcher says it
    ranks.initialize()
    own = ranks.rank()
    table = torch.arange(6).view(2, 3)
    found = {
        "sums": sums(),
        "numbers": [ranks.gather_numbers(own + 0.5), ranks.from_main(7 + own)],
        "same": disagreement({"configuration": {"lr": 1e-3}, "data": fingerprint({"ids": table})}),
        "other value": disagreement({"configuration": {"lr": 1e-3 * (1 + 1e-12 * own)}}),
        "other bit": disagreement({"first": 1, "data": fingerprint({"ids": table + own * (table == 5)})}),
        "other shape": disagreement({"data": fingerprint({"ids": table if own else table.view(3, 2)})}),
    }
    print("RESULT", json.dumps(found), flush=True)
    ranks.finalize()


if __name__ == "__main__":
    main()
