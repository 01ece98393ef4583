"""What every command shares: flags, and the rule that a mistake is one line, printed once, with exit status
2.

Nothing here imports torch before the configuration is checked: ``--help`` and mistakes answer in a fraction
of a second.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from sparse_llama.errors import SparseLlamaError

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

    from sparse_llama.training.loop import fit  # seconds: torch, transformers, deepspeed

    fit(run)


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
    if is_main():
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
