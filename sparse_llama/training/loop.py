"""The training run: validate, train, validate, save, with everything it measured in ``output_dir``."""

import gc
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_llama.config.run import Run
from sparse_llama.distributed import ranks
from sparse_llama.distributed.agreement import check_agreement
from sparse_llama.model.checks import check_first_loss
from sparse_llama.reporting.tables import plain_console
from sparse_llama.training import report
from sparse_llama.training.agreed import agreed_configuration, agreed_session
from sparse_llama.training.checkpoint import Position, newest_checkpoint
from sparse_llama.training.divergence import RECORD, Divergence
from sparse_llama.training.engine import MONITOR_BLOCKS, gradient_norm, optimizer_step
from sparse_llama.training.host_memory import private_bytes
from sparse_llama.training.metrics import (
    Clock,
    Monitors,
    StepLines,
    StepMetrics,
    peak_memory_bytes,
    write_json,
)
from sparse_llama.training.moment import FINISHING, UPDATE, VALIDATION, Moment
from sparse_llama.training.out_of_memory import (
    RunOutOfMemoryError,
    Shortage,
    describe,
    is_out_of_memory,
    release,
)
from sparse_llama.training.output import OutputFolder, publish_adapter, writing
from sparse_llama.training.progress import TrainingProgress
from sparse_llama.training.resuming import find_start, resume
from sparse_llama.training.retries import forget_retries, read_retries
from sparse_llama.training.saves import VALIDATIONS, Saves
from sparse_llama.training.session import Session, prepare
from sparse_llama.training.stopping import Interrupted, Stopping, lost_rank, words_of_lost_rank
from sparse_llama.training.validation import Validation, validate


def fit(run: Run, *, num_retries: int = 0) -> None:
    """Train the adapter that ``run`` describes and leave the results in ``run.output_dir``.

    Joins the process group and stays in it: whoever started the process leaves it (``ranks.finalize``).

    Args:
        num_retries: times that this run was started again because its memory had run out.

    Raises:
        RunOutOfMemoryError: memory ran out, wherever in the run; a job of one process has then saved every
            finished step if it could.
        StoppedError: a signal or the time budget stopped it; every finished step is saved.
        DivergedError: the loss was no number, or worse than guessing, for too many steps.
        RankLostError: another rank of the job has ended.
    """
    started_s = time.monotonic()
    ranks.initialize()
    try:
        check_agreement(lambda: agreed_configuration(run))
        with OutputFolder(run.output_dir) as folder:
            shortage = _fit(run, folder, num_retries, started_s)
    except RuntimeError as error:
        if (words := words_of_lost_rank(error)) is None:
            raise
        raise lost_rank(words, newest_checkpoint(run.output_dir / "checkpoints")) from error
    if shortage is not None:
        gc.collect()  # the engine is part of cycles, and whoever catches this may need its memory
        raise RunOutOfMemoryError(shortage)


def _fit(run: Run, folder: OutputFolder, num_retries: int, started_s: float) -> Shortage | None:
    """Do the run; return what is known of the memory that ran out, if it did."""
    console = plain_console(is_quiet=not ranks.is_main())
    moment, baseline_bytes = Moment("preparing the run"), private_bytes()
    session = position = saves = None
    try:
        start = find_start(run)
        session = prepare(run, console)
        check_agreement(lambda: agreed_session(session, start))
        folder.take()
        position = _begin(session, num_retries) if start is None else resume(session, start, console)
        _record(session)
        saves = Saves(session, console, moment)
        with Stopping(moment, budget_s=run.settings.training.time_budget_s, started_s=started_s) as stopping:
            try:
                _run(session, position, saves, stopping, console, moment)
            except Interrupted:
                saves.stop(position, stopping.received)
        return None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        shortage = describe(
            error,
            moment,
            model=None if session is None else session.llama,
            engine=None if session is None else session.engine,
            baseline_bytes=baseline_bytes,
            rank=ranks.rank(),
        )
        release(error)
    is_saved = saves is not None and position is not None and _rescue(saves, position, moment)
    is_own = position is not None or run.resume is not None  # else the folder may still hold another run's
    newest = newest_checkpoint(run.output_dir / "checkpoints") if is_own else None
    if newest is None and isinstance(run.resume, Path):
        newest = run.resume
    return replace(shortage, checkpoint=newest, is_saved_now=is_saved)


def _rescue(saves: Saves, position: Position, moment: Moment) -> bool:
    """Save the finished steps after memory ran out in the middle of another; return whether that was done.

    Masters and moments change in the optimizer's update only: wherever else memory ran out they are those of
    the last finished step. Other ranks wait in the middle of that step, and cannot save.
    """
    is_intact = (moment.phase != UPDATE or moment.step == position.step) and not saves.is_withheld
    if not is_intact or position.step == 0 or ranks.world_size() > 1 or saves.has(position):
        return False
    try:
        saves.now(position)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _run(
    session: Session,
    position: Position,
    saves: Saves,
    stopping: Stopping,
    console: Console,
    moment: Moment,
) -> None:
    """Validate, train, validate, and leave the results."""
    report.show_start(console, session)
    if position.before is None:
        start = session.run.settings.training.init_adapter
        console.print(f"validating {'the base model' if start is None else start} ...")
        position.before = asdict(_validate(session, moment))
        _check_base(session, position.before["loss"])
    final = _train(session, position, saves, stopping, console, moment)
    _finish(session, position, saves, final, console)


def _train(
    session: Session,
    position: Position,
    saves: Saves,
    stopping: Stopping,
    console: Console,
    moment: Moment,
) -> Validation:
    """Take the remaining steps; return the validation after the last."""
    run, engine = session.run, session.engine
    training = run.settings.training
    files = _Files(run.output_dir, position, session.total_steps, console) if ranks.is_main() else None
    monitors = Monitors(
        {name: run.deepspeed[name] for name in MONITOR_BLOCKS if name in run.deepspeed}, run.output_dir
    )
    clock = Clock(position.elapsed_s)
    divergence = Divergence(session, (position.before or {})["loss"])
    engine.train()
    with TrainingProgress(console, position.step, session.total_steps) as progress:
        for step in range(position.step + 1, session.total_steps + 1):
            if (reason := stopping.reason()) is not None:
                saves.stop(position, reason)
            clock.start()
            started_s = time.perf_counter()
            lr = engine.get_lr()[0]
            micro_batches = session.batches.step(step - 1, run.gradient_accumulation_steps)
            moment.step = step
            loss_sum, labelled = optimizer_step(engine, micro_batches, moment)
            tokens = sum(batch.input_ids.numel() for batch in micro_batches) * ranks.world_size()
            duration_s = time.perf_counter() - started_s
            clock.stop()

            position.advance(loss_sum, labelled, tokens, clock.elapsed_s)
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
            if files is not None:
                files.steps.append(asdict(metrics))
            monitors.write(
                step, {"train/loss": metrics.loss, "train/lr": lr, "train/grad_norm": metrics.grad_norm}
            )
            progress.update(metrics)

            divergence.look(step, metrics.loss, engine.get_global_grad_norm(), moment)
            saves.is_withheld = divergence.onset is not None
            if saves.is_withheld:  # there is nothing worth saving, or validating
                divergence.check_patience(saves.newest(), is_last=step == session.total_steps)
                continue
            if _is_due(step, training.eval_every) and step < session.total_steps:
                validation = _validate(session, moment)
                monitors.write(step, {"validation/loss": validation.loss})
                if files is not None:
                    files.add(step, asdict(validation))
                console.print(f"step {step}  validation loss {validation.loss:.4f}{report.score(validation)}")
            if _is_due(step, training.save_every) and step < session.total_steps:
                saves.try_now(position)
    saves.now(position)
    final = _validate(session, moment)
    monitors.write(session.total_steps, {"validation/loss": final.loss})
    if files is not None:
        files.add(session.total_steps, asdict(final))
    saves.prune()
    return final


class _Files:
    """The lines that a run leaves as it goes on."""

    def __init__(self, output_dir: Path, position: Position, total_steps: int, console: Console) -> None:
        self.steps = StepLines(output_dir / "metrics.jsonl", position.step, console)
        known = min(position.step, total_steps - 1)  # the last validation follows the last checkpoint
        self._validations = StepLines(output_dir / VALIDATIONS, known, console)
        if position.step == 0 and position.before is not None:
            self.add(0, position.before)

    def add(self, step: int, validation: dict[str, Any]) -> None:
        """Add a validation, without the answers."""
        self._validations.append(
            {"step": step, "loss": validation["loss"], "exact_match": validation["exact_match"]}
        )


def _begin(session: Session, num_retries: int) -> Position:
    """Make the output folder this run's own."""
    output_dir = session.run.output_dir
    if ranks.is_main() and num_retries == 0:
        forget_retries(output_dir)
    if ranks.is_main() and session.run.overwrite and (output_dir / "run.json").exists():
        for name in ("checkpoints", "adapter", "tensorboard", "csv_monitor"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
        for name in ("metrics.jsonl", VALIDATIONS, "summary.json", RECORD):
            (output_dir / name).unlink(missing_ok=True)
    return Position()


def _record(session: Session) -> None:
    """Write ``run.json``: what this run is, as it was started last."""
    output_dir = session.run.output_dir
    with writing(output_dir):
        if ranks.is_main():
            retries = {"retries": read_retries(output_dir)}
            write_json(output_dir / "run.json", report.run_record(session) | retries)


def _finish(session: Session, position: Position, saves: Saves, final: Validation, console: Console) -> None:
    """Publish the adapter and the summary, then show both."""
    run, last = session.run, saves.now(position)
    saves.moment.enter(FINISHING)
    with writing(run.output_dir):
        if ranks.is_main():
            publish_adapter(last, run.output_dir)
            summary = report.summarize(session, position, final)
            summary["retries"] = read_retries(run.output_dir)
            write_json(run.output_dir / "summary.json", summary)
            report.show_answers(console, session, position, final)
            report.show_summary(console, session, summary)


def _validate(session: Session, moment: Moment) -> Validation:
    moment.enter(VALIDATION)
    return validate(
        session.objective,
        session.llama,
        session.plan,
        session.tokenizer,
        session.validation_batches,
        session.answerable,
        session.run.settings.training,
    )


def _check_base(session: Session, loss: float) -> None:
    if session.adapter.rope_parameters is not None:
        return  # a base that knows its words may guess at first where its positions were stretched far
    model = session.run.settings.model
    check_first_loss(
        loss,
        vocab_size=session.llama.config.vocab_size,
        source=model.path,
        random_weights=model.random_weights,
    )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
