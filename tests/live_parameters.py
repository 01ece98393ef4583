"""The most parameters that DeepSpeed's stage 3 has whole at once in a step, of those it moves.

    python live_parameters.py cells.json

For every cell, as ``profiled_steps.py`` has them, prints a line of JSON with the elements that were
whole, looked at before and after every module.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from profiled_steps import DTYPES
from torch import nn

from sparse_llama.config.run import Overrides, load_run
from sparse_llama.data.batches import Batch
from sparse_llama.distributed import ranks
from sparse_llama.model.assemble import assemble
from sparse_llama.model.objective import TokenLoss
from sparse_llama.training.engine import optimizer_step, start_engine


def count(cell: dict[str, Any], folder: Path) -> dict[str, int]:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    (folder / "config.json").write_text(json.dumps(cell["config"]))
    (folder / "run.json").write_text(json.dumps(cell["document"]))
    run = load_run(folder / "run.json", Overrides(), 1)
    model = assemble(
        run.settings,
        run.layouts,
        dtype=DTYPES[run.precision],
        checkpointing=run.checkpointing,
        zero3_config=run.deepspeed,
    ).model
    engine = start_engine(run, TokenLoss(model, loss_tile=run.settings.memory.loss_tile), model, None)
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


def main() -> None:
    cells = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ranks.initialize()
    with tempfile.TemporaryDirectory() as name:
        for cell in cells:
            cell["document"]["sparse_llama"]["model"] = {"path": name, "random_weights": True}
            print(json.dumps(count(cell, Path(name))), flush=True)
    ranks.finalize()


if __name__ == "__main__":
    main()
