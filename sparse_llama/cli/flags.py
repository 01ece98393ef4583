"""Flags that commands share, and a parser whose mistakes are one line with the nearest known flag."""

import argparse
import errno
import os
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from sparse_llama.cli.entry import is_main, tell
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from sparse_llama.config.flags import Overrides


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line, printed by the main rank only."""

    def parse_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]}: unknown flag{self._nearest_flag(unknown[0])}")
        return parsed

    def error(self, message: str) -> NoReturn:
        tell(f"{message}; see --help")
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


def add_run_flags(flags: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add ``--ds_config`` and every flag of ``Overrides`` to ``flags``, but for those that mean nothing to a
    command."""
    flags.add_argument(
        "--ds_config", type=Path, metavar="FILE", help="JSON document of the run (default: the bundled demo)"
    )
    group = flags.add_argument_group("overrides of the document")

    def add(flag: str, **options: Any) -> None:
        if flag.removeprefix("--") not in without:
            group.add_argument(flag, **options)

    add("--model", metavar="ID|DIR", help="base model: a hub id, a folder, or bundled:tiny-llama")
    add("--dataset", metavar="ID|FILE", help="data set: a hub id, a file, or bundled:people")
    add("--adapter", metavar="v1|v2|PATH", help="adapter version, or an adapter to train on from")
    add("--seq_length", type=int, metavar="N", help="tokens of a row")
    add(
        "--micro_batch_size",
        type=int,
        metavar="N",
        help="rows in the model at a time; a step keeps its number of rows",
    )
    add(
        "--rope",
        choices=("linear", "dynamic", "yarn"),
        help="stretch positions to seq_length, where that is longer than the base was made for",
    )
    add(
        "--attention",
        choices=("dense", "sparse"),
        help="dense ignores the sparse_attention block, sparse needs it",
    )
    add("--steps", type=int, metavar="N", help="optimizer steps to run, instead of epochs")
    add("--epochs", type=int, metavar="N", help="passes over the data, instead of steps")
    add("--save_every", type=int, metavar="N", help="steps between checkpoints")
    add(
        "--time_budget_s",
        type=float,
        metavar="S",
        help="seconds after which this start of the run must have saved and ended",
    )
    add("--lr", type=float, metavar="X", help="peak learning rate")
    add("--seed", type=int, metavar="N", help="of everything that is drawn")
    add("--zero_stage", type=int, choices=(0, 1, 2, 3), help="DeepSpeed ZeRO stage")
    add(
        "--offload",
        choices=("none", "cpu", "nvme"),
        help="stages 1 and 2: the optimizer, to cpu; stage 3: optimizer and parameters, to cpu or nvme",
    )
    add(
        "--checkpointing",
        choices=("none", "gpu", "cpu", "nvme"),
        help="keep only layers' inputs for the backward pass, and where: beside the model, in host memory, "
        "on a drive",
    )
    add(
        "--number_checkpoints", type=int, metavar="N", help="layer inputs to keep: every k-th, k = layers / N"
    )
    add("--loss_tile", type=int, metavar="N", help="labelled tokens whose logits exist at a time; 0 is all")
    add("--mlp_tile", type=int, metavar="N", help="tokens in an MLP at a time; 0 is all")
    add("--norm_tile", type=int, metavar="N", help="tokens in a norm at a time; 0 is all")
    add(
        "--head_groups",
        type=_count_or_auto,
        metavar="N",
        help="groups of heads, one at a time; 0 is transformers' layer, auto is 0 unless only groups fit",
    )
    add(
        "--nvme_path",
        type=Path,
        metavar="DIR",
        help="folder on the drive, for --offload nvme and --checkpointing nvme",
    )
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
    """Return the flags that ``add_run_flags`` added; those left out were not given."""
    from sparse_llama.config.flags import Overrides

    given = vars(arguments)
    return Overrides(**{field.name: given[field.name] for field in fields(Overrides) if field.name in given})


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """Add what ``open_model`` needs: which model, which adapter, in which precision."""
    add = flags.add_argument
    add("--model", metavar="ID|DIR", help="a hub id, a folder, an export, or bundled:tiny-llama")
    add(
        "--adapter",
        type=Path,
        metavar="PATH",
        help="a run's output folder, its adapter/, or an adapter of PEFT, lit-llama, litgpt or LLaMA-Adapter",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to compute in (default: the adapter's run's, or the one in config.json)",
    )
    add(
        "--dense_attention",
        action="store_true",
        help="full attention in place of the layout that the adapter was trained with: another function",
    )
    add("--trust_remote_code", action="store_true", help="run modelling code that the model brings")
    add(
        "--template",
        choices=("alpaca", "tokenizer"),
        help="around questions (default: the one of training, else alpaca); tokenizer: its chat template",
    )


def make_room_for(flag: str, file: Path) -> None:
    """Make the folder of a ``file`` that is written after minutes of work, or say now that it cannot be.

    Raises:
        ConfigError: naming ``flag``, which gave the file.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise ConfigError(f"{flag} {file}: cannot be written ({error.strerror}); name a file") from error


def _count_or_auto(value: str) -> int | Literal["auto"]:
    return "auto" if value == "auto" else int(value)


def _resume(value: str) -> Literal["auto"] | Path:
    return "auto" if value == "auto" else Path(value)
