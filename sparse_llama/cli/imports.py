"""``launch/import_adapter.py``: another program's adapter as one of this project's."""

import argparse
import shlex
from pathlib import Path

from sparse_llama.cli.entry import is_main
from sparse_llama.cli.flags import Parser, parser


def import_adapter_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/import_adapter.py``: what is read, its base, and where it goes."""
    flags = parser(doc)
    add = flags.add_argument
    add(
        "--adapter",
        type=Path,
        required=True,
        metavar="FILE|DIR",
        help="an adapter of PEFT, lit-llama, litgpt or LLaMA-Adapter",
    )
    add("--model", metavar="ID|DIR", help="its base; needed where the format does not name it (all but PEFT)")
    add("--output", type=Path, required=True, metavar="DIR", help="adapter folder to make")
    add("--overwrite", action="store_true", help="replace the adapter in the output folder")
    return flags


def import_adapter(arguments: argparse.Namespace) -> None:
    """Read the adapter, check it against its base's configuration, and write it as an adapter folder."""
    if not is_main():
        return  # writing files is one process' work
    from sparse_llama.export import import_adapter
    from sparse_llama.reporting.tables import show_table

    imported = import_adapter(
        arguments.adapter, arguments.output, model=arguments.model, overwrite=arguments.overwrite
    )
    show_table("imported", imported.rows())
    folder = shlex.quote(str(imported.folder))
    print(f"Next:\n\n  python launch/generate.py --adapter {folder} --prompt TEXT")
    print(f"  deepspeed launch/train.py --ds_config FILE --adapter {folder}\n")
