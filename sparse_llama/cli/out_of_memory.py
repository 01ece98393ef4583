"""What a user is told when memory ran out, and how a run starts again with a setting that saves some."""

import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from sparse_llama.reporting.tables import format_bytes

if TYPE_CHECKING:
    from sparse_llama.config.run import Run
    from sparse_llama.planning.estimate import Estimate, Place
    from sparse_llama.planning.quick import Change
    from sparse_llama.training.out_of_memory import FailedBatch, Shortage

MOST_RETRIES = 8
"""About as many as there are levers; each retry pulls another one."""
_MOST_CHANGES, _MOST_PARTS = 5, 4  # shown
_WIDTH, _LABEL_WIDTH, _NUMBER_WIDTH = 110, 42, 12


def explain(
    shortage: "Shortage", planned: "Estimate | None", changes: "Sequence[Change]", *, reason: str = ""
) -> str:
    """Return what happened, where the memory is, and what would fit: a few lines, no traceback.

    Args:
        planned: of the run as it is; None where that could not be computed.
        reason: why there are no changes, or nothing was retried.
    """
    asked = "more memory" if shortage.asked_bytes is None else f"{format_bytes(shortage.asked_bytes)} more"
    device = "the GPU" if shortage.place == "gpu" else "the host"
    lines = [f"out of memory: {asked} asked for on {device}", "", f"  where        {shortage.where}"]
    if shortage.asked_bytes is None:
        lines.append(f"  allocator    {shortage.message}")
    if shortage.batch is not None:
        lines.append(f"  batch        {_describe(shortage.batch)}")
    lines.append(f"  checkpoint   {_checkpoint(shortage)}")
    lines += ["", *_table(shortage, planned), "", *_would_fit(changes, shortage.place)]
    if reason:
        lines.append(textwrap.fill(reason, _WIDTH, initial_indent="  ", subsequent_indent="  "))
    return "\n".join(lines)


def told_change(change: "Change") -> str:
    """Return a change as its flags, or its keys, and what it does."""
    return textwrap.fill(f"{change}: {change.sentence}", _WIDTH, subsequent_indent="  ")


def restart(run: "Run", shortage: "Shortage", change: "Change", num_retries: int) -> NoReturn:
    """Replace this process by one that runs the same command with ``change``, from the newest checkpoint.

    The process keeps its number, its environment and its limits: the launcher does not notice.
    """
    # DeepSpeed's launcher and ``python -m`` put words before the script's own
    num_words = len(sys.orig_argv) - len(sys.argv) + 1
    words = [*sys.orig_argv[1:num_words], *again(sys.argv[1:]), *change.flags, "--retry", str(num_retries)]
    if shortage.checkpoint is not None:
        words += ["--resume", str(shortage.checkpoint)]
    elif (run.output_dir / "run.json").exists():
        words.append("--overwrite")
    sys.stdout.flush()
    sys.stderr.flush()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # sockets that would keep the launcher's port
    os.execv(sys.executable, [sys.executable, *words])


def again(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without those that say where its run begins."""
    kept: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, _ = word.partition("=")
        if name not in ("--overwrite", "--resume", "--retry"):
            kept.append(word)
        elif name != "--overwrite" and not has_value and rest and not rest[0].startswith("-"):
            rest.pop(0)
    return kept


def _describe(batch: "FailedBatch") -> str:
    rows = f"{batch.num_rows} row{'s' if batch.num_rows > 1 else ''} of {batch.num_tokens:,} tokens"
    documents = f"{batch.num_documents} document{'s' if batch.num_documents > 1 else ''}"
    return (
        f"{rows}; {documents}, the longest {batch.longest_document:,}; {batch.num_labelled:,} labelled tokens"
    )


def _checkpoint(shortage: "Shortage") -> str:
    if shortage.checkpoint is None:
        return "none yet"
    saved = ", saved now, with every finished step" if shortage.is_saved_now else ""
    return f"{shortage.checkpoint}{saved}; --resume goes on from there"


def _table(shortage: "Shortage", planned: "Estimate | None") -> Iterator[str]:
    """Yield planned against actual bytes by component; the plan knows more parts than can be told apart in a
    process that has stopped."""
    from sparse_llama.training.out_of_memory import REST

    held = dict(shortage.held)
    parts = {} if planned is None else dict(planned.components.get(shortage.place, {}))
    finer = {name: size for name, size in parts.items() if name not in held}
    yield _row("GPU memory" if shortage.place == "gpu" else "host memory", "planned", "held")
    for name, size in held.items():
        if name != REST:
            yield _row(f"  {name}", _bytes(parts.get(name)), _bytes(size))
            continue
        yield _row(f"  {name}", _bytes(sum(finer.values()) if parts else None), _bytes(size))
        for part in sorted(finer, key=lambda part: -finer[part])[:_MOST_PARTS]:
            yield _row(f"    {part}", _bytes(finer[part]), "")
    total = None if planned is None else planned.peak_bytes.get(shortage.place)
    limit = "" if shortage.limit_bytes is None else f" of {format_bytes(shortage.limit_bytes)}"
    allowed = f"{limit} ({shortage.limit_name})" if limit else ""
    yield _row("  all", _bytes(total), _bytes(shortage.held_bytes)) + allowed


def _row(label: str, planned: str, held: str) -> str:
    return f"  {label:<{_LABEL_WIDTH}}{planned:>{_NUMBER_WIDTH}}{held:>{_NUMBER_WIDTH}}".rstrip()


def _bytes(count: int | None) -> str:
    return "" if count is None else format_bytes(count)


def _would_fit(changes: "Sequence[Change]", place: "Place") -> Iterator[str]:
    if not changes:
        return
    yield "  would fit, smallest change first:"
    for change in changes[:_MOST_CHANGES]:
        saved = change.saves.get(place, 0)
        yield f"    {change}" + (f"   saves {format_bytes(saved)}" if saved > 0 else "")
        yield textwrap.fill(change.sentence, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
