"""What every command shares: flags, and the rule that a mistake is one line, printed once, with exit status
2.

Nothing here imports torch before the configuration is checked: ``--help`` and mistakes answer in a fraction
of a second.
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from sparse_llama.errors import ConfigError, SparseLlamaError

if TYPE_CHECKING:
    from sparse_llama.config.flags import Overrides
    from sparse_llama.model.assemble import OpenedModel

DEFAULT_NEW_TOKENS = 256
MAIN_SPEAKS_WITHIN_S = 10


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line, printed by the main rank only."""

    def parse_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]}: unknown flag{self._nearest_flag(unknown[0])}")
        return parsed

    def error(self, message: str) -> NoReturn:
        _tell(f"{message}; see --help")
        raise SystemExit(2)

    def print_help(self, file=None) -> None:
        if is_main():
            super().print_help(file)

    def _nearest_flag(self, unknown: str) -> str:
        from sparse_llama.config.section import suggest

        if not unknown.startswith("-"):
            return " (a value without its flag)"
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        hint = suggest(unknown.split("=", 1)[0], [name for action in shown for name in action.option_strings])
        return hint if "did you mean" in hint else ""


def parser(doc: str | None) -> Parser:
    """Return a parser that shows ``doc``, a script's docstring, and takes what the launcher inserts."""
    made = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return made


def train_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/train.py``: a document, and flags that override it for one run."""
    flags = parser(doc)
    add_run_flags(flags)
    return flags


def add_run_flags(flags: argparse.ArgumentParser) -> None:
    """Add ``--ds_config`` and every flag of ``Overrides`` to ``flags``."""
    flags.add_argument(
        "--ds_config", type=Path, metavar="FILE", help="JSON document of the run (default: the bundled demo)"
    )
    add = flags.add_argument_group("overrides of the document").add_argument
    add("--model", metavar="ID|DIR", help="base model: a hub id, a folder, or bundled:tiny-llama")
    add("--dataset", metavar="ID|FILE", help="data set: a hub id, a file, or bundled:people")
    add("--adapter", choices=("v1", "v2"), help="adapter version")
    add("--seq_length", type=int, metavar="N", help="tokens of a row")
    add(
        "--attention",
        choices=("dense", "sparse"),
        help="dense ignores the sparse_attention block, sparse needs it",
    )
    add("--steps", type=int, metavar="N", help="optimizer steps to run, instead of epochs")
    add("--epochs", type=int, metavar="N", help="passes over the data, instead of steps")
    add("--lr", type=float, metavar="X", help="peak learning rate")
    add("--seed", type=int, metavar="N", help="of everything that is drawn")
    add("--zero_stage", type=int, choices=(0, 1, 2, 3), help="DeepSpeed ZeRO stage")
    add(
        "--offload",
        choices=("none", "cpu", "nvme"),
        help="stages 1 and 2: the optimizer, to cpu; stage 3: optimizer and parameters, to cpu or nvme",
    )
    add("--nvme_path", type=Path, metavar="DIR", help="folder on the drive for --offload nvme")
    add(
        "--output_dir", type=Path, metavar="DIR", help="where results go (default: runs/NAME of the document)"
    )
    add(
        "--resume",
        nargs="?",
        const="auto",
        type=_resume,
        metavar="DIR",
        help="continue the newest checkpoint of the output folder, or the one in DIR",
    )
    add("--overwrite", action="store_true", help="replace the run in the output folder")


def overrides(arguments: argparse.Namespace) -> "Overrides":
    """Return the flags that ``add_run_flags`` added."""
    from sparse_llama.config.flags import Overrides

    return Overrides(**{field.name: getattr(arguments, field.name) for field in fields(Overrides)})


def train(arguments: argparse.Namespace) -> None:
    """Check the configuration, then train; only then is torch imported."""
    from sparse_llama.config.run import load_run

    run = load_run(arguments.ds_config, overrides(arguments), world_size(), is_main=is_main())

    from sparse_llama.distributed import ranks
    from sparse_llama.training.loop import fit  # seconds: torch, transformers, deepspeed

    try:
        fit(run)
    finally:
        ranks.finalize()


def evaluate_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/evaluate.py``: a model, data, and how it is measured."""
    flags = parser(doc)
    add_model_flags(flags)
    add = flags.add_argument
    add("--data", required=True, metavar="NAME|FILE", help="wikitext2, ptb, c4, a file, or bundled:people")
    add("--window", type=int, metavar="W", help="tokens read at once (default: the model's length)")
    add("--stride", type=int, metavar="S", help="tokens between windows (default: the window)")
    add("--exact_match", type=int, default=0, metavar="N", help="also compare N answers to their records")
    add("--max_new_tokens", type=int, default=64, metavar="N", help="of an answer that is compared")
    add("--json", type=Path, metavar="FILE", help="write the result there too")
    return flags


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure a model on data: a table, and a JSON file where one is asked for."""
    from sparse_llama.distributed import ranks
    from sparse_llama.evaluation.evaluate import evaluate, to_json, to_rows
    from sparse_llama.reporting.tables import show_table
    from sparse_llama.training.metrics import device_name, git_commit, versions, write_json

    if arguments.json is not None and is_main():
        _make_room_for(arguments.json)
    if world_size() > 1:
        ranks.initialize()
    try:
        opened = _open(arguments)
        result = evaluate(
            opened,
            arguments.data,
            window=arguments.window,
            stride=arguments.stride,
            num_answers=arguments.exact_match,
            max_new_tokens=arguments.max_new_tokens,
        )
        if is_main():
            show_table("evaluation", to_rows(result))
            if arguments.json is not None:
                adapter = None if arguments.adapter is None else str(arguments.adapter)
                asked = {"model": arguments.model, "adapter": adapter, "data": arguments.data}
                where = {"device": device_name(), "versions": versions(), "git_commit": git_commit()}
                write_json(arguments.json, to_json(result) | asked | where)
    finally:
        if world_size() > 1:
            ranks.finalize()


def generate_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/generate.py``: a model, a prompt, and how tokens are chosen."""
    flags = parser(doc)
    add_model_flags(flags)
    add = flags.add_argument
    add("--prompt", required=True, metavar="TEXT", help="instruction; with --raw, the text to continue")
    add("--context", default="", metavar="TEXT", help="text that the instruction is about")
    add("--raw", action="store_true", help="no template; an empty prompt continues the beginning of sequence")
    add("--max_new_tokens", type=int, metavar="N", help="length at most (default: 256, or what fits)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    add("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens of this share")
    add("--top_k", type=int, default=0, metavar="K", help="draw from this many likeliest tokens; 0 is all")
    add("--seed", type=int, default=42, metavar="N", help="of the draws")
    return flags


def generate(arguments: argparse.Namespace) -> None:
    """Answer a prompt; the answer, as it is written, is all there is on standard output."""
    if not is_main():
        return  # one prompt is one process' work
    if arguments.raw and arguments.context:
        raise ConfigError("--context: belongs to the template, which --raw leaves out; put it into --prompt")
    from sparse_llama.data.prompt import alpaca_prompt
    from sparse_llama.generation import encode_prompt, generate_stream, room_after

    prompt = arguments.prompt if arguments.raw else alpaca_prompt(arguments.prompt, arguments.context)
    opened = _open(arguments)
    length = arguments.max_new_tokens
    if length is None:
        room = room_after(opened.model, len(encode_prompt(opened.tokenizer, prompt)))
        length = min(room, DEFAULT_NEW_TOKENS)
        if room < DEFAULT_NEW_TOKENS:
            print(f"note: the model has room for an answer of at most {room} tokens", file=sys.stderr)
    for piece in generate_stream(
        opened.model,
        opened.tokenizer,
        prompt,
        max_new_tokens=length,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
    ):
        print(piece, end="", flush=True)
    print()


def export_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/export.py``: what is exported, where to, and as what."""
    flags = parser(doc)
    add = flags.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="a run, its adapter/ or a step_NNNNNN")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add(
        "--format",
        choices=("merged", "native"),
        default="merged",
        help="merged (default): a model for transformers; native: the adapter alone",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of merged weights (default: what the run computed in)",
    )
    add("--model", metavar="ID|DIR", help="base to merge into (default: the one that the adapter names)")
    add("--overwrite", action="store_true", help="replace the export in the output folder")
    return flags


def export(arguments: argparse.Namespace) -> None:
    """Write an adapter, or a base with its adapter, as others can use it; checked before it is published."""
    if not is_main():
        return  # writing files is one process' work
    if arguments.format == "native":
        for name in ("dtype", "model"):
            if getattr(arguments, name) is not None:
                raise ConfigError(
                    f"--{name}: belongs to --format merged; a native export is the adapter's fp32 tensors as "
                    "they are"
                )
        from sparse_llama.export import export_native

        folder = export_native(arguments.checkpoint, arguments.output, overwrite=arguments.overwrite)
        print(f"{folder}: the adapter, for --adapter of evaluate.py and generate.py")
        return

    import torch

    from sparse_llama.export import export_merged
    from sparse_llama.reporting.tables import show_table

    _hide_loading_bars()
    exported = export_merged(
        arguments.checkpoint,
        arguments.output,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        model=arguments.model,
        overwrite=arguments.overwrite,
    )
    show_table("export", exported.rows())
    print(f"It opens with\n\n  {exported.opens_with}\n")


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """Add what ``open_model`` needs: which model, which adapter, in which precision."""
    add = flags.add_argument
    add("--model", metavar="ID|DIR", help="a hub id, a folder, an export, or bundled:tiny-llama")
    add("--adapter", type=Path, metavar="DIR", help="a run's output folder or its adapter/; names its base")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to compute in (default: the adapter's run's, or the one in config.json)",
    )
    add("--trust_remote_code", action="store_true", help="run modelling code that the model brings")


def _open(arguments: argparse.Namespace) -> "OpenedModel":
    import torch

    from sparse_llama.distributed.ranks import device
    from sparse_llama.model.assemble import open_model

    _hide_loading_bars()
    return open_model(
        arguments.model,
        _adapter_folder(arguments.adapter),
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        device=device(),
        trust_remote_code=arguments.trust_remote_code,
    )


def _hide_loading_bars() -> None:
    """Keep transformers' progress bars, which belong to no command of ours, off standard error."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _make_room_for(file: Path) -> None:
    """Make the folder of a file that is to be written after minutes of work, or say now that it cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise ConfigError(f"--json {file}: cannot be written ({error.strerror}); name a file") from error


def _adapter_folder(folder: Path | None) -> Path | None:
    """Return the adapter's own folder where a run's output folder is given."""
    if folder is None or (folder / "adapter_config.json").is_file() or not (folder / "adapter").is_dir():
        return folder
    return folder / "adapter"


def main(
    call: Callable[[argparse.Namespace], object],
    flags: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse the command line and make the ``call``; a user's mistake ends the process with one line and
    status 2.

    Raises:
        SystemExit: 2 after a mistake, 130 after Ctrl-C; every other exception is ours and keeps its
        traceback.
    """
    try:
        call(flags.parse_args(argv))
    except SparseLlamaError as error:
        _tell(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if is_main():
            _tell("interrupted")
        raise SystemExit(130) from None


def is_main() -> bool:
    """Return whether this process is the one of the job that prints, going by the launcher's environment
    alone."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def world_size() -> int:
    """Return the number of processes of the job, going by the launcher's environment alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _resume(value: str) -> Literal["auto"] | Path:
    return "auto" if value == "auto" else Path(value)


def _tell(message: str) -> None:
    line = "error: " + " ".join(message.split())
    if not is_main():
        # The launcher ends the job when the first rank ends: the main one, which says the same, must be it.
        # Still here after that, this rank is the only one with the mistake.
        time.sleep(MAIN_SPEAKS_WITHIN_S)
        line += f" (rank {os.environ.get('RANK')})"
    print(line, file=sys.stderr, flush=True)
