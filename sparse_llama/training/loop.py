"""The training run: validate, train, validate, save, with everything it measured in ``output_dir``."""

import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from sparse_llama.adapters.weights import CONFIG_NAME, WEIGHTS_NAME
from sparse_llama.config.run import Run
from sparse_llama.distributed import ranks
from sparse_llama.errors import CheckpointError
from sparse_llama.model.checks import check_first_loss
from sparse_llama.training import report
from sparse_llama.training.checkpoint import (
    Position,
    checkpoint_name,
    find_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from sparse_llama.training.engine import MONITOR_BLOCKS, gradient_norm, optimizer_step
from sparse_llama.training.metrics import (
    Clock,
    MetricsFile,
    Monitors,
    StepMetrics,
    peak_memory_bytes,
    write_json,
)
from sparse_llama.training.progress import TrainingProgress
from sparse_llama.training.session import Session, prepare
from sparse_llama.training.validation import Validation, validate


def fit(run: Run) -> None:
    """Train the adapter that ``run`` describes and leave the results in ``run.output_dir``.

    Joins the process group and stays in it: whoever started the process leaves it (``ranks.finalize``).
    """
    ranks.initialize()
    console = Console(quiet=not ranks.is_main(), highlight=False, width=None if sys.stdout.isatty() else 110)
    session = prepare(run, console)
    position = _resume(session, console) if run.resume is not None else _begin(session)
    report.show_start(console, session)
    if position.before is None:
        start = run.settings.training.init_adapter
        console.print(f"validating {'the base model' if start is None else start} ...")
        position.before = asdict(_validate(session))
        _check_base(session, position.before["loss"])
    final = _train(session, position, console)
    _finish(session, position, final, console)


def _train(session: Session, position: Position, console: Console) -> Validation:
    """Take the remaining steps; return the validation after the last."""
    run, engine = session.run, session.engine
    training = run.settings.training
    metrics_file = MetricsFile(run.output_dir / "metrics.jsonl", position.step) if ranks.is_main() else None
    monitors = Monitors(
        {name: run.deepspeed[name] for name in MONITOR_BLOCKS if name in run.deepspeed}, run.output_dir
    )
    clock = Clock(position.elapsed_s)
    engine.train()
    with TrainingProgress(console, position.step, session.total_steps) as progress:
        for step in range(position.step + 1, session.total_steps + 1):
            clock.start()
            started_s = time.perf_counter()
            lr = engine.get_lr()[0]
            micro_batches = session.batches.step(step - 1, run.gradient_accumulation_steps)
            loss_sum, labelled = optimizer_step(engine, micro_batches)
            tokens = sum(batch.input_ids.numel() for batch in micro_batches) * ranks.world_size()
            duration_s = time.perf_counter() - started_s
            clock.stop()

            position.step = step
            position.loss_sum += loss_sum
            position.labelled_tokens += labelled
            position.tokens += tokens
            position.elapsed_s = clock.elapsed_s
            peaks = peak_memory_bytes()
            metrics = StepMetrics(
                step=step,
                loss=loss_sum / max(labelled, 1),
                lr=lr,
                grad_norm=gradient_norm(engine),
                tokens=labelled,
                tokens_per_s=tokens / duration_s,
                elapsed_s=clock.elapsed_s,
                peak_memory_bytes=peaks["gpu"] or peaks["host"],
            )
            if metrics_file is not None:
                metrics_file.append(metrics)
            monitors.write(
                step, {"train/loss": metrics.loss, "train/lr": lr, "train/grad_norm": metrics.grad_norm}
            )
            progress.update(metrics)

            if _is_due(step, training.eval_every) and step < session.total_steps:
                validation = _validate(session)
                monitors.write(step, {"validation/loss": validation.loss})
                console.print(f"step {step}  validation loss {validation.loss:.4f}{report.score(validation)}")
            if _is_due(step, training.save_every):
                _save(session, position)
    if not _last_checkpoint(session, position).exists():
        _save(session, position)
    final = _validate(session)
    monitors.write(session.total_steps, {"validation/loss": final.loss})
    return final


def _begin(session: Session) -> Position:
    """Make the output folder this run's own."""
    output_dir = session.run.output_dir
    if ranks.is_main() and session.run.overwrite and (output_dir / "run.json").exists():
        for name in ("checkpoints", "adapter", "tensorboard", "csv_monitor"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
        for name in ("metrics.jsonl", "summary.json"):
            (output_dir / name).unlink(missing_ok=True)
    _record(session)
    return Position()


def _resume(session: Session, console: Console) -> Position:
    run = session.run
    assert run.resume is not None
    folder = find_checkpoint(run.output_dir / "checkpoints", run.resume)
    position = load_checkpoint(folder, session.engine, session.parameters)
    console.print(f"resuming from {folder}")
    if position.step > session.total_steps:
        raise CheckpointError(
            f"{folder}: stands at step {position.step}, beyond the {session.total_steps} of this run; give "
            "it more --steps or --epochs"
        )
    _record(session)
    return position


def _record(session: Session) -> None:
    """Write ``run.json``: what this run is, as it was started last."""
    if ranks.is_main():
        session.run.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(session.run.output_dir / "run.json", report.run_record(session))
    ranks.barrier()


def _save(session: Session, position: Position) -> None:
    folder = session.run.output_dir / "checkpoints"
    save_checkpoint(folder, session.engine, session.parameters, session.adapter, position)
    prune_checkpoints(folder, session.run.settings.training.keep_last)


def _last_checkpoint(session: Session, position: Position) -> Path:
    return session.run.output_dir / "checkpoints" / checkpoint_name(position.step)


def _finish(session: Session, position: Position, final: Validation, console: Console) -> None:
    """Publish the adapter and the summary, then show both."""
    run = session.run
    if ranks.is_main():
        last = _last_checkpoint(session, position)
        adapter = run.output_dir / "adapter"
        adapter.mkdir(exist_ok=True)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            shutil.copyfile(last / name, adapter / name)
        summary = report.summarize(session, position, final)
        write_json(run.output_dir / "summary.json", summary)
        report.show_answers(console, session, position, final)
        report.show_summary(console, session, summary)
    ranks.barrier()


def _validate(session: Session) -> Validation:
    return validate(
        session.objective,
        session.llama,
        session.tokenizer,
        session.validation_batches,
        session.answerable,
        session.run.settings.training,
    )


def _check_base(session: Session, loss: float) -> None:
    model = session.run.settings.model
    check_first_loss(
        loss,
        vocab_size=session.llama.config.vocab_size,
        source=model.path,
        random_weights=model.random_weights,
    )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
