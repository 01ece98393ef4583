"""A job that sums through DeepSpeed's shared memory, and what the job's port has a name for meanwhile."""

import json
import os
from pathlib import Path

import deepspeed.comm
import torch

from sparse_llama.distributed import ranks


def main() -> None:
    os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]  # all on this machine, as the launcher says it
    ranks.initialize()
    total = torch.full((4096,), ranks.rank() + 1.0)
    deepspeed.comm.inference_all_reduce(total)  # through the shared memory; all_reduce is gloo's
    ranks.barrier()
    named = [one.name for one in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")]
    print("RESULT", json.dumps([total.unique().tolist(), named]), flush=True)
    ranks.finalize()


if __name__ == "__main__":
    main()
