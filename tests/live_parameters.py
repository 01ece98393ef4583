"""The most parameters that DeepSpeed's stage 3 has whole at once in a step, of those it moves.

    python live_parameters.py cells.json

For every cell, as ``profiled_steps.py`` has them, prints a line of JSON with the elements that were
whole, looked at before and after every module.
"""

from pathlib import Path
from typing import Any

import torch
from profiled_steps import print_cells, run_of
from torch import nn

from sparse_llama.data.batches import Batch
from sparse_llama.training.engine import optimizer_step
from sparse_llama.training.session import start_model


def count(cell: dict[str, Any], folder: Path) -> dict[str, int]:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    run = run_of(cell, folder)
    assembled, _, engine = start_model(run, None)
    model = assembled.model
    engine.train()
    most = 0
    is_looking = False

    def look(module: nn.Module, *_: Any) -> None:
        nonlocal most
        if is_looking:
            whole: list[Any] = [
                one
                for one in model.parameters()
                if one.ds_status != ZeroParamStatus.NOT_AVAILABLE and not one.ds_persist  # type: ignore[attr-defined]
            ]
            most = max(most, sum(one.ds_numel for one in whole))

    for module in model.modules():
        module.register_forward_pre_hook(look)
        module.register_forward_hook(look)
        module.register_full_backward_hook(look)
    num_tokens = run.settings.seq_length
    for step in range(4):  # the first two are traced, and fetch nothing ahead
        is_looking = step == 3
        ids = torch.randint(model.config.vocab_size, (1, num_tokens))
        optimizer_step(engine, [Batch(ids, torch.arange(num_tokens)[None], ids.clone())])
    engine.destroy()
    return {"live": most}


if __name__ == "__main__":
    print_cells(count)
