"""One step of configurations, as its gradient, then whole runs; by one process or by a job."""

import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from sparse_llama import cli
from sparse_llama.config.run import Overrides, load_run
from sparse_llama.distributed import ranks
from sparse_llama.evaluation.loss import mean_token_loss
from sparse_llama.training.engine import optimizer_step
from sparse_llama.training.loop import fit
from sparse_llama.training.masters import read_masters, write_masters
from sparse_llama.training.session import prepare

SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"
LEARNING_RATE = 1024.0
"""A step of plain gradient descent moves a tensor by this times its gradient: far enough for fp32 masters
near 1 to give the gradient to seven digits."""
DESCENT = {
    "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1, "warmup_min_lr": LEARNING_RATE}},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


def take_step(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what a configuration's first step measures, and every trainable tensor's gradient."""
    run = load_run(path, Overrides(output_dir=path.parent / "unused"), world_size=ranks.world_size())
    ranks.initialize()
    session = prepare(run, Console(file=io.StringIO()))
    before = read_masters(session.engine, session.parameters)
    generator = torch.Generator().manual_seed(3)
    for name in sorted(before):  # away from its start, where a prompt behind a gate of 0 has no gradient
        before[name] += 0.1 * torch.randn(before[name].shape, generator=generator)
    write_masters(session.engine, session.parameters, before)
    session.objective.eval()
    validation_loss = mean_token_loss(session.objective, session.validation_batches)
    session.engine.train()
    micro_batches = session.batches.step(0, run.gradient_accumulation_steps)
    loss_sum, labelled = optimizer_step(session.engine, micro_batches)
    after = read_masters(session.engine, session.parameters)
    measured = {
        "validation_loss": validation_loss,
        "loss_sum": loss_sum,
        "labelled": labelled,
        "labelled_here": [batch.num_labelled for batch in micro_batches],
        "tokens_here": [batch.input_ids.shape[1] for batch in micro_batches],
        "num_starts": int(sum((batch.position_ids == 0).sum() for batch in micro_batches)),
        "begins_inside_a_document": bool((micro_batches[0].position_ids[:, 0] > 0).any()),
    }
    session.engine.destroy()
    return measured, {name: (before[name] - after[name]) / LEARNING_RATE for name in before}


def write_step(path: Path) -> None:
    """Take the step of a configuration and leave beside it what came of it."""
    measured, gradients = take_step(path)
    (path.parent / f"measured_{ranks.rank()}.json").write_text(json.dumps(measured), encoding="utf-8")
    if ranks.is_main():
        save_file(gradients, path.parent / "gradients.safetensors")


def train(arguments: list[str]) -> None:
    """Do what ``launch/train.py`` does with ``arguments``, but for leaving the process group, for good."""
    parsed = cli.train_parser(None).parse_args(arguments)
    fit(load_run(parsed.ds_config, cli.overrides(parsed), cli.world_size(), is_main=cli.is_main()))


if __name__ == "__main__":
    steps, training = (json.loads(argument) for argument in sys.argv[-2:])
    for path in steps:
        write_step(Path(path))
    for arguments in training[:-1]:
        train(arguments)
    for arguments in training[-1:]:
        sys.argv = [str(SCRIPT), *arguments]
        runpy.run_path(str(SCRIPT), run_name="__main__")
    ranks.finalize()
