"""The memory of a step, lever by lever, beside others: what is measured, in which order, and what is told."""

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_llama import cli
from sparse_llama.benchmark.memory import (
    ONLY_ON_GPU,
    OTHERS,
    RUNG_KEYS,
    Contender,
    MeasuredCell,
    MemoryBook,
    MemoryCell,
    next_cell,
    rungs,
)
from sparse_llama.benchmark.memory_cell import make_llama, training_step
from sparse_llama.benchmark.memory_report import cell_row, longest_row, memory_panels
from sparse_llama.benchmark.shapes import Shape
from sparse_llama.errors import ConfigError
from sparse_llama.planning.probe import CRASHED, FITS, OUT_OF_MEMORY, Figures, Outcome, Status, run_module
from sparse_llama.planning.probe import Cell as ProbeCell
from sparse_llama.training.moment import Moment

L, C, H, K, D, F, V, P = 4, 32, 4, 2, 8, 48, 61, 10
SHAPE = Shape(L, C, H, K, D, F, V)
MIB = 2**20
PLAIN, LAST = Contender("transformers"), Contender("v2", RUNG_KEYS[-1])


def book(folder: Path, device: str = "cpu") -> MemoryBook:
    dtype = "float32" if device == "cpu" else "bfloat16"
    return MemoryBook(folder / "memory.json", folder, SHAPE, device, dtype, budget_bytes=100 * MIB)


def fits(peak_bytes: int, tensor_bytes: int = 0) -> Outcome:
    figures = Figures(0, 0, 500 * MIB + peak_bytes, tensor_bytes, libraries_bytes=500 * MIB, step_s=1.5)
    return Outcome(FITS, figures=figures)


def order_of(contenders: list[Contender], lengths: list[int], statuses: dict[MemoryCell, Status]):
    """Return the cells in the order in which they are measured, each with the outcome given."""
    found: dict[MemoryCell, Outcome] = {}
    while (cell := next_cell(contenders, lengths, found.get)) is not None:
        found[cell] = Outcome(statuses.get(cell, FITS))
    return [(cell.contender.kind, cell.num_tokens) for cell in found]


def test_short_rows_come_first_so_that_a_call_that_is_stopped_has_compared_something():
    order = order_of([PLAIN, LAST], [256, 64], {})
    assert order == [("transformers", 64), ("v2", 64), ("transformers", 256), ("v2", 256)]


def test_after_a_row_that_ran_out_of_memory_only_the_longest_is_tried_but_after_a_crash_all_are():
    lengths = [64, 128, 256, 512]
    assert order_of([PLAIN], lengths, {MemoryCell(PLAIN, 64): OUT_OF_MEMORY}) == [
        ("transformers", 64),
        ("transformers", 512),
    ]
    crashed = order_of([PLAIN], lengths, {MemoryCell(PLAIN, 64): CRASHED})
    assert [length for _, length in crashed] == lengths


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_each_rung_has_the_levers_of_those_before_it_and_one_more(version: str, tmp_path: Path):
    """A ladder that drops a lever on the way would credit the next one with both."""
    made = book(tmp_path)
    made.prepare()
    runs = [
        made.probe_of(Contender(version, key), 256).run_of(ProbeCell(0, "none", 256)) for key in RUNG_KEYS
    ]
    memory = [run.settings.memory.model_dump() for run in runs]
    checkpointing = [run.checkpointing for run in runs]
    tiles = {"loss_tile": 2048, "mlp_tile": 2048, "norm_tile": 2048}
    last = tiles | {"head_groups": 4, "checkpoint_nvme_path": str(tmp_path / "drive")}
    assert {run.settings.adapter.version for run in runs} == {version}
    assert memory[0] == memory[1] == dict.fromkeys(last)
    assert memory[4] == dict.fromkeys(last) | tiles
    assert memory[-1] == memory[-2] == last
    assert checkpointing[0] is None
    kept = [one and (one.cpu_checkpointing, one.number_checkpoints) for one in checkpointing[1:]]
    assert kept == [(False, None)] * 4 + [(True, None)] * 2 + [(True, 2)]
    for before, after in pairwise(memory):
        assert all(after[name] == value for name, value in before.items() if value is not None)


def test_on_a_gpu_inputs_wait_in_host_memory_and_the_model_computes_in_bf16(tmp_path: Path):
    made = book(tmp_path, "cuda")
    made.prepare()
    run = made.probe_of(LAST, 256).run_of(ProbeCell(0, "none", 256))
    assert run.settings.memory.checkpoint_nvme_path is None
    assert run.checkpointing is not None
    assert run.checkpointing.cpu_checkpointing
    assert run.precision == "bf16"
    assert [one.key for one in rungs("cuda", L, tmp_path)] == list(RUNG_KEYS)


@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind not in ONLY_ON_GPU])
def test_others_train_as_their_users_train(kind: str):
    """Without checkpointing a layer runs once; with it once more; the backward pass reaches the embedding of
    plain transformers, and of PEFT the prompts and nothing else."""
    if kind.startswith("peft"):
        pytest.importorskip("peft")
    llama = make_llama(kind, SHAPE, 64, torch.float32)
    calls, reached = [0] * L, []
    for index, layer in enumerate(llama.model.layers):
        norm: Any = layer.input_layernorm
        norm.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))

    def watch(_module: object, _args: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(reached.append)

    llama.model.embed_tokens.register_forward_hook(watch)
    before = {name: one.detach().clone() for name, one in llama.named_parameters()}
    training_step(llama, 64, Moment())(1)
    assert all(count in ((1,) if kind == "transformers" else (1, 2)) for count in calls)
    assert calls[-1] == (1 if kind == "transformers" else 2)
    moved = {name for name, one in llama.named_parameters() if not torch.equal(one, before[name])}
    trained = {name for name, one in llama.named_parameters() if one.requires_grad}
    assert moved <= trained
    assert bool(trained) == kind.startswith("peft")
    assert all("adaption" in name for name in trained)
    if not kind.startswith("peft"):
        assert [one.shape for one in reached] == [(1, 64, C)]


@pytest.mark.slow
def test_memory_that_runs_out_in_a_process_is_a_result_that_says_where(tmp_path: Path):
    """400 MB of logits within 128 MiB, where the weights and all else have room."""
    order = {"kind": "transformers", "shape": asdict(replace(SHAPE, vocabulary=100_000))}
    order |= {"num_tokens": 1024, "dtype": "float32", "budget_bytes": 128 * MIB}
    order |= {"num_steps": 1, "counts_tensors": False}
    outcome = run_module("sparse_llama.benchmark.memory_cell", "one", tmp_path, order, num_ranks=1)
    assert outcome.status == OUT_OF_MEMORY
    assert outcome.figures is None
    assert "in the forward pass" in outcome.reason
    assert "you tried to allocate 409600000 bytes" in outcome.reason


def test_a_table_has_the_process_beside_the_plan_and_out_of_memory_in_its_place(tmp_path: Path):
    made = book(tmp_path)
    fitted = fits(40 * MIB, 20 * MIB)
    planned = Outcome(fitted.status, figures=fitted.figures, planned_bytes={"host": 21 * MIB})
    made.cells = {
        MemoryCell(PLAIN, 64): MeasuredCell(fits(60 * MIB), 3.0),
        MemoryCell(PLAIN, 128): MeasuredCell(Outcome(OUT_OF_MEMORY, "in the backward pass"), 3.0),
        MemoryCell(LAST, 64): MeasuredCell(planned, 3.0),
    }
    made.longest = {LAST: 4096}
    name = "v2, + every 2nd input"
    row = [name, "fits", "40.0 MiB", "20.0 MiB", "21.0 MiB", "+5.0%", "1.50 s"]
    assert cell_row(made, MemoryCell(LAST, 64)) == row
    assert cell_row(made, MemoryCell(PLAIN, 64)) == ["transformers", "fits", "60.0 MiB", *"---", "1.50 s"]
    assert cell_row(made, MemoryCell(PLAIN, 128)) == ["transformers", "out of memory", *"-----"]
    assert longest_row(made, PLAIN) == ["transformers", "64", "128", "-"]
    assert longest_row(made, LAST) == [name, "64", "-", "4,096"]
    ((peaks,), (times,)) = memory_panels(made)
    curves = {curve.label: curve for curve in peaks.curves}
    assert list(curves) == ["transformers", "+ every 2nd input"]
    assert curves["transformers"].values == [60 / 1024]
    assert curves["transformers"].fails_at == (128,)
    assert (peaks.level, peaks.is_log) == (100 / 1024, True)
    assert [curve.values for curve in times.curves] == [[1.5], [1.5]]


def benchmark(folder: Path, *arguments: str) -> None:
    asked = ["memory", "--shape", "small", "--output_dir", str(folder), *arguments]
    cli.main(cli.benchmark, cli.benchmark_parser("doc"), asked)


@pytest.mark.slow
def test_the_command_measures_saves_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Every cell is a process, and a long benchmark is stopped and started again."""
    monkeypatch.chdir(tmp_path)
    asked = ("--lengths", "128", "--contenders", "transformers_checkpointed,v2", "--rungs", "checkpointing")
    benchmark(tmp_path, *asked, "--budget_gib", "2")
    saved = json.loads((tmp_path / "memory_cpu.json").read_text(encoding="utf-8"))
    theirs, ours = saved["cells"]
    for one in (theirs, ours):
        assert one["status"] == FITS
        # the weights are 4 layers of 3.2 MB and two of 2 MB, which every step has beside what it computes
        assert one["figures"]["peak_tensor_bytes"] > 4 * 3_162_112 + 2 * 2_048_000
        assert one["figures"]["step_s"] < one["elapsed_s"]
    assert theirs["planned_bytes"] is None
    assert ours["planned_bytes"]["host"] == pytest.approx(ours["figures"]["peak_tensor_bytes"], rel=0.05)
    assert (tmp_path / "memory_cpu.png").stat().st_size > 10_000
    text = (tmp_path / "memory_cpu.md").read_text(encoding="utf-8")
    assert "| v2, checkpointing | 128 | - | - |" in text
    assert "| transformers, checkpointing | fits | " in text
    capsys.readouterr()

    def measured_again(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("sparse_llama.benchmark.memory.measure_cell", measured_again)
    benchmark(tmp_path, *asked, "--budget_gib", "2")
    assert "2 measurements are there already" in capsys.readouterr().out
    assert json.loads((tmp_path / "memory_cpu.json").read_text(encoding="utf-8"))["cells"] == saved["cells"]
    with pytest.raises(SystemExit):
        benchmark(tmp_path, *asked, "--budget_gib", "1")
    assert (
        "measurements of another run (other budget_bytes); start anew with --overwrite"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths", "100"), "--lengths: must be multiples of the block, 64, got 100"),
        (("--rungs", "loss_tiles"), "--rungs: none is called 'loss_tiles'; did you mean 'loss_tile'?"),
        (("--contenders", "v3"), "--contenders: none is called 'v3'"),
        (("--budget_gib", "0"), "--budget_gib: must be > 0, got 0.0"),
        (("--blocks", "64"), "--blocks: belongs to attention; memory does not take it"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        benchmark(tmp_path, *arguments)
    assert message in capsys.readouterr().err


def test_a_crash_is_tried_again_and_memory_that_ran_out_is_not(tmp_path: Path):
    """A crash says something of the machine or of a mistake, and would stay in the table for ever."""
    made, again = book(tmp_path), book(tmp_path)
    assert made.resume({}) == 0
    out_of_memory = MeasuredCell(Outcome(OUT_OF_MEMORY, "in the backward pass"), 3.0)
    made.cells = {
        MemoryCell(PLAIN, 64): MeasuredCell(fits(60 * MIB), 3.0),
        MemoryCell(PLAIN, 128): MeasuredCell(Outcome(CRASHED, "ImportError"), 3.0),
        MemoryCell(LAST, 64): out_of_memory,
    }
    made.longest = {LAST: 4096}
    made.save({})
    assert again.resume({}) == 2
    assert again.cells == {cell: made.cells[cell] for cell in (MemoryCell(PLAIN, 64), MemoryCell(LAST, 64))}
    assert again.longest == made.longest


def test_a_file_that_is_no_benchmark_is_refused(tmp_path: Path):
    made = book(tmp_path)
    made.file.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="no readable measurements"):
        made.resume({})
