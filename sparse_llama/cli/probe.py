"""``launch/probe_memory.py``: what a run really takes, at each ZeRO stage, offload and length."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_llama.cli.entry import is_main
from sparse_llama.cli.flags import Parser, add_run_flags, overrides, parser
from sparse_llama.cli.results import budget_bytes, make_folder, numbers, split, tell_files
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from sparse_llama.config.run import Run
    from sparse_llama.planning.probe import Cell, Outcome, Probe

_OWN = ("zero_stage", "offload", "seq_length", "steps", "epochs", "resume", "overwrite", "output_dir")
"""Flags of a run that are something else here, or nothing."""
_STAGES, _OFFLOADS = ("0", "1", "2", "3"), ("none", "cpu", "nvme")


def probe_memory_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/probe_memory.py``: a run, what to toggle, and a budget."""
    flags = parser(doc)
    add_run_flags(flags, without=_OWN)
    add = flags.add_argument_group("what to measure").add_argument
    add("--zero_stages", default="0,1,2,3", metavar="N,N,...", help="ZeRO stages (default: all)")
    add(
        "--offload",
        dest="offloads",
        default="none,cpu",
        metavar="WHERE,...",
        help="none, cpu, nvme (default: none,cpu)",
    )
    add("--lengths", metavar="N,N,...", help="tokens of a row (default: the document's)")
    add("--longest", action="store_true", help="find the longest row that fits, by trying")
    add("--steps", dest="num_steps", type=int, default=2, metavar="N", help="of each, the first untimed (2)")
    add("--ranks", type=int, default=1, metavar="N", help="processes of each")
    add(
        "--budget_gib",
        type=float,
        metavar="X",
        help="let each process take that much: of its GPU, or of host memory beyond its libraries "
        "(default: what there is)",
    )
    add("--no_plan", action="store_true", help="leave out what was planned")
    add("--output_dir", dest="folder", type=Path, metavar="DIR", help="default: runs/NAME_probe")
    add("--overwrite", dest="is_anew", action="store_true", help="forget what an earlier call has measured")
    return flags


def probe_memory(arguments: argparse.Namespace) -> None:
    """Measure every combination in processes of their own; show and save what came of it.

    Raises:
        ConfigError: the document or a flag is wrong, or the folder holds another run's probe.
    """
    if not is_main():
        return  # each cell starts its own processes
    from sparse_llama.config.run import load_run

    stages, offloads = _choices("zero_stages", arguments.zero_stages, _STAGES), arguments.offloads
    offloads = _choices("offload", offloads, _OFFLOADS)
    lengths = numbers("lengths", arguments.lengths)
    _check_numbers(arguments)
    budget = budget_bytes(arguments.budget_gib)
    run = load_run(arguments.ds_config, overrides(arguments), arguments.ranks, is_main=False)
    if run.settings.memory.head_groups == "auto":
        raise ConfigError(
            'sparse_llama.memory.head_groups: "auto" is what a plan makes of it, and a probe measures one '
            "setting; give a number with --head_groups, 0 for none"
        )

    from sparse_llama.planning.probe import Cell, Probe
    from sparse_llama.planning.probe_report import show_longest, show_probe
    from sparse_llama.planning.shapes import find_base

    config = find_base(run.settings.model).config
    folder = arguments.folder or Path("runs") / f"{run.name}_probe"
    make_folder(folder)
    has_rope = run.settings.model.rope_parameters is not None
    probe = Probe(
        config_path=arguments.ds_config,
        overrides=overrides(arguments),
        output_dir=folder,
        budget_bytes=budget,
        num_steps=arguments.num_steps,
        num_ranks=arguments.ranks,
        stretched_from=None if has_rope else config.max_position_embeddings,
    )
    if arguments.is_anew:
        probe.file.unlink(missing_ok=True)
    num_found = probe.resume(_identity(run, probe))
    if num_found:
        print(f"{probe.file}: {num_found} cells are there already")
    measured = _Measurer(probe, run, None if arguments.no_plan else config)
    pairs = [(int(stage), offload) for stage in stages for offload in offloads]
    cells = [Cell(*pair, length) for pair in pairs for length in lengths or (run.settings.seq_length,)]
    measured.all_of(cells)
    if arguments.longest:
        for pair in pairs:
            measured.longest(pair, [cell.num_tokens for cell in cells if cell.zero_stage == pair[0]])
    shown = [cell for cell in probe.outcomes if (cell.zero_stage, cell.offload) in pairs]
    show_probe(probe, shown)
    if arguments.longest:
        show_longest(probe, pairs)
    tell_files([probe.file, *measured.draw(shown)])


class _Measurer:
    """Measures what is not there yet, and shows each as it comes."""

    def __init__(self, probe: "Probe", run: "Run", config: "LlamaConfig | None") -> None:
        from sparse_llama.planning.probe_report import LiveTable

        self._probe, self._run, self._config = probe, run, config
        self._table = LiveTable(probe)

    def all_of(self, cells: "list[Cell]") -> None:
        """Measure ``cells`` in order."""
        with self._table.showing(cells):
            for cell in cells:
                self.one(cell)

    def one(self, cell: "Cell") -> "Outcome":
        """Return what came of a cell, now or in an earlier call."""
        from sparse_llama.planning.probe import measure

        known = self._probe.outcomes.get(cell)
        if known is not None:
            return known
        self._table.begin(cell)
        outcome = measure(self._probe, cell)
        outcome = replace(outcome, planned_bytes=self._planned(cell, outcome))
        self._probe.keep(cell, outcome)
        self._table.end(cell)
        return outcome

    def longest(self, pair: tuple[int, str], lengths: list[int]) -> None:
        """Find the longest row of a stage and an offload."""
        from sparse_llama.planning.probe import FITS, Cell
        from sparse_llama.planning.probe_search import find_longest

        fitting = [length for length in lengths if self._probe.outcomes[Cell(*pair, length)].status == FITS]
        step = max(self._run.layouts.align, 16) * self._run.sequence_parallel_size
        with self._table.showing([]):
            bracket = find_longest(
                lambda length: self.one(Cell(*pair, length)), max(fitting, default=min(lengths)), step
            )
        if bracket.other is None or bracket.fits:
            self._probe.longest[pair] = bracket.fits
            self._probe.save()

    def draw(self, cells: "list[Cell]") -> list[Path]:
        """Save the curves of what was measured; return the file, if there is anything to draw."""
        from sparse_llama.planning.probe_report import panels
        from sparse_llama.reporting.curves import save_curves

        rows = panels(self._probe, cells)
        if not rows:
            return []
        file = self._probe.file.with_suffix(".png")
        save_curves(rows, f"{self._run.name}: {self._run.settings.model.path}, measured in steps", file)
        return [file]

    def _planned(self, cell: "Cell", outcome: "Outcome") -> dict[str, int] | None:
        from sparse_llama.planning.probe import NOT_APPLICABLE

        if self._config is None or outcome.status == NOT_APPLICABLE:
            return None

        from sparse_llama.distributed.ranks import device
        from sparse_llama.planning.estimate import estimate

        kind = "cuda" if device().type == "cuda" else "cpu"
        run, num_ranks = self._probe.run_of(cell), self._probe.num_ranks
        return estimate(run, self._config, device=kind, ranks=num_ranks).run_bytes


def _identity(run: "Run", probe: "Probe") -> dict[str, Any]:
    """Return what two calls must have in common for one to go on where the other stopped."""
    from sparse_llama.training.metrics import device_name, versions

    document = run.to_json()
    for name in ("output_dir", "resume", "overwrite", "notices", "schedule"):
        del document[name]
    return document | {
        "budget_bytes": probe.budget_bytes,
        "num_steps": probe.num_steps,
        "num_ranks": probe.num_ranks,
        "device": device_name(),
        "versions": versions(),
    }


def _choices(flag: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    words = split(text)
    unknown = [word for word in words if word not in allowed]
    if unknown:
        raise ConfigError(
            f"--{flag}: must be of {', '.join(allowed)}, with commas between them, got {text!a}"
        )
    return words


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.num_steps < 2:
        raise ConfigError(f"--steps: must be >= 2, as the first is not timed, got {arguments.num_steps}")
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks: must be >= 1, got {arguments.ranks}")
