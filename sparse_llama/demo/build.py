"""Builds the bundled demo from nothing: ``python -m sparse_llama.demo.build --output DIR``.

Writes ``DIR/model`` (config, weights, tokenizer) and ``DIR/data/people`` (training and validation records).
The base takes about 80 minutes on one core; a build that was stopped continues from ``DIR/state`` when
started again.
"""

import argparse
import functools
import json
from pathlib import Path

import sentencepiece
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from sparse_llama.demo.base import BaseRun, train_base
from sparse_llama.demo.dataset import write_dataset
from sparse_llama.demo.tokenizer import train_tokenizer
from sparse_llama.demo.world import make_world


def build(output: Path, run: BaseRun) -> None:
    """Write tokenizer, data set and base under ``output``."""
    world = make_world()
    tokenizer_path = output / "model" / "tokenizer.model"
    if not tokenizer_path.exists():
        train_tokenizer(world, tokenizer_path)
    write_dataset(output / "data" / "people")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    say = functools.partial(print, flush=True)
    model = train_base(world, tokenizer, run, output / "state" / "base.pt", report=say)
    save_model(model, output / "model")


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config and bf16 weights to ``folder``: what ``LlamaForCausalLM.from_pretrained`` opens."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id, do_sample=False
    )
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.bfloat16().save_pretrained(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m sparse_llama.demo.build", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to, and to continue in")
    parser.add_argument("--steps", type=int, default=BaseRun.num_steps, help="steps of the base")
    parser.add_argument("--threads", type=int, default=1, help="threads for torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    build(arguments.output, BaseRun(num_steps=arguments.steps))


if __name__ == "__main__":
    main()
