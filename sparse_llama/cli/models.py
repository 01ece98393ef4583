"""``launch/generate.py`` and ``export.py``: a model, with an adapter or without."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_llama.cli.entry import is_main
from sparse_llama.cli.flags import Parser, add_model_flags, parser
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from sparse_llama.export import Exported
    from sparse_llama.model.assemble import OpenedModel

DEFAULT_NEW_TOKENS = 256
_FOREIGN = ("peft", "lit-llama", "litgpt", "llama-adapter")  # interop's, which takes seconds to import


def generate_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/generate.py``: a model, a prompt, and how tokens are chosen."""
    flags = parser(doc)
    add_model_flags(flags)
    add = flags.add_argument
    add("--prompt", metavar="TEXT", help="instruction; with --raw, the text to continue")
    add("--chat", action="store_true", help="converse in the terminal instead; /help there lists commands")
    add("--context", default="", metavar="TEXT", help="text that the instruction is about")
    add("--raw", action="store_true", help="no template; an empty prompt continues the beginning of sequence")
    add("--max_new_tokens", type=int, metavar="N", help="length at most (default: 256, or what fits)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    add("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens of this share")
    add("--top_k", type=int, default=0, metavar="K", help="draw from this many likeliest tokens; 0 is all")
    add("--seed", type=int, default=42, metavar="N", help="of the draws")
    return flags


def generate(arguments: argparse.Namespace) -> None:
    """Answer a prompt, or converse; an answer, as it is written, is all there is on standard output."""
    if not is_main():
        return  # one prompt is one process' work
    if arguments.chat:
        _chat(arguments)
        return
    if arguments.prompt is None:
        raise ConfigError("--prompt: nothing to answer; give an instruction, or --chat to converse")
    if arguments.raw and arguments.context:
        raise ConfigError("--context: belongs to the template, which --raw leaves out; put it into --prompt")
    from sparse_llama.data.template import write_prompt
    from sparse_llama.generation import encode_prompt, generate_stream, room_after

    if arguments.raw and arguments.template:
        raise ConfigError("--template: is what --raw leaves out; give one of them")
    opened = open_asked(arguments)
    tokenizer = opened.tokenizer if arguments.raw else opened.templated
    prompt = arguments.prompt
    if not arguments.raw:
        prompt = write_prompt(tokenizer, arguments.prompt, arguments.context)
    length = arguments.max_new_tokens
    if length is None:
        room = room_after(opened.model, len(encode_prompt(tokenizer, prompt)))
        length = min(room, DEFAULT_NEW_TOKENS)
        if room < DEFAULT_NEW_TOKENS:
            print(f"note: the model has room for an answer of at most {room} tokens", file=sys.stderr)
    for piece in generate_stream(
        opened.model,
        tokenizer,
        prompt,
        max_new_tokens=length,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
    ):
        print(piece, end="", flush=True)
    print()


def _chat(arguments: argparse.Namespace) -> None:
    """Converse until the end of input."""
    for flag in ("prompt", "context", "raw"):
        if getattr(arguments, flag):
            raise ConfigError(f"--{flag}: has no part in --chat, where questions are typed; leave it out")
    from sparse_llama.cli.chat import Chat, converse, read_line
    from sparse_llama.generation import check_sampling

    most = 1 if arguments.max_new_tokens is None else arguments.max_new_tokens
    check_sampling(most, arguments.temperature, arguments.top_p, arguments.top_k)
    opened = open_asked(arguments)
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k", "seed")}
    chat = Chat(opened, max_new_tokens=arguments.max_new_tokens, **sampling)
    print(f"{opened.description}; template {opened.template}. /help lists commands.", file=sys.stderr)
    converse(chat, lambda: read_line("> "))


def export_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/export.py``: what is exported, where to, and as what."""
    flags = parser(doc)
    add = flags.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR|FILE",
        help="a run, its adapter/, a step_NNNNNN, or another program's adapter",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add(
        "--format",
        choices=("merged", "native", *_FOREIGN),
        default="merged",
        help="merged (default): a model for transformers; native: the adapter alone; else another program's",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of merged weights (default: what the run computed in)",
    )
    add("--model", metavar="ID|DIR", help="base of the adapter (default: the one that the adapter names)")
    without = flags.add_argument_group(
        "to make the export plain; the validation loss with and without is told"
    )
    add = without.add_argument
    add(
        "--drop_prompt", action="store_true", help="leave the prompts of a v2 adapter out of the merged model"
    )
    add("--drop_head_bias", action="store_true", help="leave the head's bias out of a merged model")
    add("--dense_attention", action="store_true", help="leave the sparse layout out")
    add("--data", metavar="NAME|FILE", help="to measure that on (default: the run's validation data)")
    flags.add_argument("--overwrite", action="store_true", help="replace the export in the output folder")
    return flags


def export(arguments: argparse.Namespace) -> None:
    """Write an adapter, or a base with its adapter, as others can use it; checked before it is published."""
    if not is_main():
        return  # writing files is one process' work
    _check_export_flags(arguments)
    _hide_loading_bars()
    from sparse_llama.export import export_foreign, export_native
    from sparse_llama.reporting.tables import show_table

    asked = {name: getattr(arguments, name) for name in ("checkpoint", "output", "model", "overwrite")}
    if arguments.format == "native":
        folder = export_native(**asked)
        print(f"{folder}: the adapter, for --adapter of evaluate.py and generate.py")
        return
    if arguments.format == "merged":
        exported = _export_merged(arguments, asked)
    else:
        dense = arguments.dense_attention
        exported = export_foreign(arguments.format, data=arguments.data, dense_attention=dense, **asked)
    show_table("export", exported.rows())
    print(f"It opens with\n\n  {exported.opens_with}\n")


def _export_merged(arguments: argparse.Namespace, asked: dict[str, Any]) -> "Exported":
    import torch

    from sparse_llama.export import export_merged

    parts = {
        "prompt": arguments.drop_prompt,
        "head_bias": arguments.drop_head_bias,
        "layout": arguments.dense_attention,
    }
    return export_merged(
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        leave_out=[part for part, is_out in parts.items() if is_out],  # type: ignore[misc]
        data=arguments.data,
        **asked,
    )


def _check_export_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that have no part in the format."""
    if arguments.format == "merged":
        return
    merged_only = ("dtype", "drop_prompt", "drop_head_bias")
    for name in merged_only if arguments.format in _FOREIGN else (*merged_only, "dense_attention", "data"):
        if getattr(arguments, name):
            raise ConfigError(
                f"--{name}: belongs to --format merged; {arguments.format} is the adapter's fp32 tensors as "
                "they are"
            )


def open_asked(arguments: argparse.Namespace) -> "OpenedModel":
    """Return the model that ``add_model_flags`` has asked for, and say what its adapter has to be told of."""
    import torch

    from sparse_llama.distributed.ranks import device
    from sparse_llama.model.assemble import open_model

    _hide_loading_bars()
    opened = open_model(
        arguments.model,
        arguments.adapter,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        device=device(),
        trust_remote_code=arguments.trust_remote_code,
        dense_attention=arguments.dense_attention,
        template=arguments.template,
    )
    if is_main():
        for notice in opened.notices:
            print(f"note: {arguments.adapter}: {notice}", file=sys.stderr)
    return opened


def _hide_loading_bars() -> None:
    """Keep transformers' progress bars, which belong to no command of ours, off standard error."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
