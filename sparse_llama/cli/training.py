"""``launch/train.py``."""

import argparse

from sparse_llama.cli.entry import is_main, world_size
from sparse_llama.cli.flags import Parser, add_run_flags, overrides, parser


def train_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/train.py``: a document, and flags that override it for one run."""
    flags = parser(doc)
    add_run_flags(flags)
    return flags


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
