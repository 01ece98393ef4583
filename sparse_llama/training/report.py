"""What a run says about itself: the start table, ``run.json``, ``summary.json``, answers, and the closing
table."""

import math
import shlex
import sys
from typing import Any

from rich.console import Console

from sparse_llama.config.run import Run
from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.data.records import Example
from sparse_llama.distributed import ranks
from sparse_llama.evaluation.exact_match import spread
from sparse_llama.reporting.tables import format_bytes, format_seconds, format_share, show_columns, show_table
from sparse_llama.training.checkpoint import Position
from sparse_llama.training.engine import count_elements
from sparse_llama.training.metrics import device_name, git_commit, peak_memory_bytes, versions
from sparse_llama.training.session import Session
from sparse_llama.training.validation import Validation


def show_start(console: Console, session: Session) -> None:
    """Print what is about to run, and everything in the configuration that will have no effect."""
    run, settings = session.run, session.run.settings
    batch = f"{run.global_batch_size} rows = {run.micro_batch_size} x {run.gradient_accumulation_steps}"
    frozen = sum(count_elements(parameter) for parameter in session.llama.parameters()) - _trainable(session)
    rows = [
        ("model", f"{settings.model.path}  ({_count(frozen)} parameters, frozen)"),
        ("adapter", _adapter(session)),
        ("attention", attention_line(session)),
        ("data", f"{settings.data.dataset}  ({len(session.validation_examples)} validation records)"),
        ("batch", f"{batch} micro-batches x {_processes(run)}"),
        ("length", f"{settings.seq_length} tokens{', packed' if settings.data.packing else ''}"),
        *_positions(session),
        ("steps", str(session.total_steps)),
        ("precision", run.precision),
        ("ZeRO stage", f"{run.zero_stage}{'' if run.offload == 'none' else f', offload to {run.offload}'}"),
        ("memory", memory_line(run)),
        ("device", device_name()),
        ("output", str(run.output_dir)),
    ]
    show_table(run.name, rows, console)
    show_table("data", session.ledger.rows(), console)
    for notice in (*run.notices, *session.notices):
        console.print(f"note: {notice}", style="yellow")


def _positions(session: Session) -> list[tuple[str, str]]:
    rope, longest = session.adapter.rope_parameters, session.llama.config.max_position_embeddings
    return [] if rope is None else [("positions", f"{longest:,}: {rope}")]


def _processes(run: Run) -> str:
    number, sharing = ranks.world_size(), run.sequence_parallel_size
    if sharing > 1:
        groups = number // sharing
        return f"{groups} group{'s' if groups > 1 else ''} of {sharing} processes that share each row"
    return f"{number} process{'es' if number > 1 else ''}"


def memory_line(run: Run) -> str:
    """Return the levers that are on."""
    block, memory = run.checkpointing, run.settings.memory
    parts: list[str] = []
    if block is not None:
        where = "on the host" if block.cpu_checkpointing else "beside the model"
        where = "on the drive" if memory.checkpoint_nvme_path is not None else where
        kept = "" if block.number_checkpoints is None else f", {block.number_checkpoints} kept"
        parts.append(f"checkpoints {where}{kept}")
    for name in ("loss_tile", "mlp_tile", "norm_tile", "head_groups"):
        value = getattr(memory, name)
        parts += [] if value is None else [f"{name} {value:,}"]
    return ", ".join(parts) or "no checkpoints, no tiles"


def attention_line(session: Session) -> str:
    """Return the attention and its token-pair density; a sparse layout that is causal at this length says
    so."""
    layouts = session.run.layouts
    if layouts.is_dense:
        return "dense"
    line = f"{layouts}, density {density(session):.2f}"
    if density(session) == 1.0:
        line += (
            f" (fully causal at {session.run.settings.seq_length} tokens: the same numbers and cost as dense)"
        )
    return line


def density(session: Session) -> float:
    """Return the token-pair density at the run's own length, averaged over layers; 1.0 is dense."""
    return session.plan.density_at(session.run.settings.seq_length)


def run_record(session: Session) -> dict[str, Any]:
    """Return what ``run.json`` holds: the resolved configuration and what is needed to repeat the run."""
    return session.run.to_json() | {
        "total_steps": session.total_steps,
        "rope_parameters": session.llama.config.rope_parameters,
        "max_position_embeddings": session.llama.config.max_position_embeddings,
        "command": [argument for argument in sys.argv if not argument.startswith("--local_rank")],
        "world_size": ranks.world_size(),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def summarize(session: Session, position: Position, final: Validation) -> dict[str, Any]:
    """Return what ``summary.json`` holds."""
    before = position.before or {}
    return {
        "name": session.run.name,
        "adapter_version": session.adapter.adapter.version,
        "trainable_parameters": _trainable(session),
        "attention": str(session.run.layouts),
        "density": density(session),
        "seq_length": session.run.settings.seq_length,
        "zero_stage": session.run.zero_stage,
        "precision": session.run.precision,
        "train_loss": position.loss_sum / max(position.labelled_tokens, 1),
        "validation_loss_before": before.get("loss"),
        "validation_loss": final.loss,
        "exact_match_before": before.get("exact_match"),
        "exact_match": final.exact_match,
        "steps": position.step,
        "tokens": position.tokens,
        "labelled_tokens": position.labelled_tokens,
        "tokens_per_s": position.tokens / position.elapsed_s if position.elapsed_s else None,
        "elapsed_s": position.elapsed_s,
        "peak_memory_bytes": peak_memory_bytes(),
        "device": device_name(),
        "data": session.ledger.to_json(),
        "versions": versions(),
    }


def show_answers(console: Console, session: Session, position: Position, final: Validation) -> None:
    """Print held-out prompts with the answers from before and after."""
    before = (position.before or {}).get("answers", [])
    shown = spread(session.answerable, session.run.settings.training.samples)
    rows = [
        [_question(example), _one_line(old), _one_line(new), _one_line(example.response)]
        for example, old, new in zip(shown, before, final.answers, strict=False)
    ]
    if rows:
        show_columns("held-out records", ["instruction", "before", "after", "reference"], rows, console)


def show_summary(console: Console, session: Session, summary: dict[str, Any]) -> None:
    """Print the closing table, where the adapter is, and the commands that come next."""
    peaks = summary["peak_memory_bytes"]
    memory = f"{format_bytes(peaks['gpu'])} GPU, " if peaks["gpu"] else ""
    rows = [
        ("parameters tuned", f"{summary['trainable_parameters']:,}"),
        ("train loss (average)", f"{summary['train_loss']:.4f}"),
        ("validation loss", f"{summary['validation_loss_before']:.4f} -> {summary['validation_loss']:.4f}"),
        *_exact_match_rows(summary["exact_match_before"], summary["exact_match"]),
        ("training time", format_seconds(summary["elapsed_s"])),
        ("tokens/s", f"{summary['tokens_per_s'] or math.nan:,.0f}"),
        ("peak memory", f"{memory}{format_bytes(peaks['host'])} host"),
    ]
    show_table("result", rows, console)
    console.print(f"The adapter is in {session.run.output_dir / 'adapter'}. Next:\n")
    for command in next_commands(session):
        console.print(f"  {shlex.join(command)}", soft_wrap=True, markup=False)
    console.print()


def next_commands(session: Session) -> list[list[str]]:
    """Return the commands that evaluate, use and export what a run has left, word by word."""
    run = session.run
    adapted = ["--model", run.settings.model.path, "--adapter", str(run.output_dir / "adapter")]
    export = ["--checkpoint", str(run.output_dir), "--output", f"exports/{run.name}", "--format", "merged"]
    return [
        ["python", "launch/evaluate.py", *adapted, "--data", run.settings.data.dataset],
        ["python", "launch/generate.py", *adapted, *_something_to_ask(session)],
        ["python", "launch/export.py", *export],
    ]


def score(validation: Validation) -> str:
    """Return exact match for a progress line, or nothing."""
    if validation.exact_match is None:
        return ""
    return f"  exact match {format_share(validation.exact_match['average'])}"


def _exact_match_rows(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[tuple[str, str]]:
    if before is None or after is None:
        return []
    rows = [("exact match", f"{format_share(before['average'])} -> {format_share(after['average'])}")]
    for category, share in after["by_category"].items():
        rows.append(
            (f"  {category}", f"{format_share(before['by_category'][category])} -> {format_share(share)}")
        )
    return rows


def _something_to_ask(session: Session) -> list[str]:
    """Return the first held-out question that needs no text beside it; a model of plain text goes on."""
    for example in session.answerable:
        if example.template == "tokenizer" and len(example.messages) == 2:
            return ["--prompt", example.messages[0].content]
        instruction = _instruction(example.prompt)
        if alpaca_prompt(instruction) == example.prompt:
            return ["--prompt", instruction]
    return ["--raw", "--prompt", "Once upon a time"]


def _question(example: Example) -> str:
    """Return instruction and input in one line: the template around them is the same for every record."""
    if example.template == "tokenizer":
        return _one_line(next(one.content for one in example.messages if one.role == "user"))
    prompt = example.prompt
    _, _, context = prompt.partition("\n\n### Input:\n")
    context = context.partition("\n\n###")[0]
    instruction = _one_line(_instruction(prompt))
    return f"{instruction} [{_one_line(context)}]" if context else instruction


def _instruction(prompt: str) -> str:
    _, _, rest = prompt.partition("### Instruction:\n")
    return (rest or prompt).partition("\n\n###")[0]


def _one_line(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _adapter(session: Session) -> str:
    start = session.run.settings.training.init_adapter
    text = f"{session.adapter.adapter.version}  ({_trainable(session):,} trainable parameters)"
    return text if start is None else f"{text}, trained on from {start}"


def _trainable(session: Session) -> int:
    return session.adapter.trainable_parameters


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
