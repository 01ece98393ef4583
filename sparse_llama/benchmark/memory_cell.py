"""A training step of plain transformers or PEFT, as a process under a budget: what ``benchmark.memory``
compares with.

The way transformers' users train: the model's own loss over all logits, PyTorch's attention, its own
checkpointing (non-reentrant). The base is frozen; without an adapter nothing trains, and the backward pass
runs through every layer: the least that plain transformers can take, without gradients of weights and without
an optimizer.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from sparse_llama.benchmark.llamas import peft_adaption_prompt, random_llama
from sparse_llama.benchmark.shapes import Shape
from sparse_llama.distributed import ranks
from sparse_llama.memory.offload_baseline import deepspeed_offload
from sparse_llama.planning.probe import FITS, Outcome
from sparse_llama.planning.probe_cell import apply_budget, failure, figures, take_steps
from sparse_llama.training.host_memory import private_bytes, resident_bytes
from sparse_llama.training.metrics import write_json
from sparse_llama.training.moment import BACKWARD, FORWARD, UPDATE, Moment


def run_other(order: dict[str, Any]) -> Outcome:
    """Return what the steps of ``order`` take; an error that can be caught is an outcome too."""
    ranks.initialize()
    moment = Moment("making the model")
    if order["kind"] == "peft_checkpointed":
        import peft  # noqa: F401  # a library, in no budget
    libraries_bytes, baseline = resident_bytes(), private_bytes()
    apply_budget(order["budget_bytes"])
    try:
        llama = make_llama(
            order["kind"], Shape(**order["shape"]), order["num_tokens"], getattr(torch, order["dtype"])
        )
        step = training_step(llama, order["num_tokens"], moment, offloads=order["kind"].endswith("offloaded"))
        taken = take_steps(
            step, order["num_steps"], (lambda: _held_bytes(llama)) if order["counts_tensors"] else None
        )
    except Exception as error:
        return failure(error, moment, baseline)
    return Outcome(FITS, figures=figures(taken, libraries_bytes))


def make_llama(kind: str, shape: Shape, num_tokens: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return one of ``benchmark.memory.OTHERS``, ready to train."""
    llama = random_llama(shape, num_tokens=num_tokens, dtype=dtype, device=ranks.device())
    if kind == "peft_checkpointed":
        llama = peft_adaption_prompt(llama)
    else:
        llama.model.embed_tokens.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    if kind != "transformers":
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    return llama.train()


def training_step(
    llama: LlamaForCausalLM, num_tokens: int, moment: Moment, *, offloads: bool = False
) -> Callable[[int], object]:
    """Return a step of one row of random tokens, every one predicted; AdamW of what trains, if anything."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(llama.config.vocab_size, (1, num_tokens), generator=generator).to(llama.device)
    parameters = [one for one in llama.parameters() if one.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-3) if parameters else None

    def step(number: int) -> None:
        moment.step = number
        moment.enter(FORWARD)
        with deepspeed_offload() if offloads else nullcontext():
            loss: Any = llama(input_ids=ids, labels=ids, use_cache=False).loss
            moment.enter(BACKWARD)
            loss.backward()
        moment.enter(UPDATE)
        if adam is not None:
            adam.step()
            adam.zero_grad()

    return step


def _held_bytes(llama: LlamaForCausalLM) -> int:
    """Return the bytes of weights, and of AdamW's two moments of what trains."""
    return sum(one.nbytes * (3 if one.requires_grad else 1) for one in llama.parameters())


def main() -> None:
    """Measure what the file on the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("order", type=Path)
    order = json.loads(parser.parse_args().order.read_text(encoding="utf-8"))
    outcome = run_other(order)
    write_json(Path(order["results"][ranks.rank()]), asdict(outcome))
    ranks.finalize()
    if not outcome.fits:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
