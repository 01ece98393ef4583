"""What is refused at the start, and what is proposed instead, by the measured ladder of v1."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shipped_runs import A100, estimator, ladder_of_v1, run_of, seven_b

from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.planning.estimate import estimate
from sparse_llama.planning.hardware import GIB, Hardware
from sparse_llama.planning.quick import check_fits, refusal, settle, smallest_changes, upper_bound_bytes
from sparse_llama.planning.search import Planner, at_length
from sparse_llama.planning.shapes import find_base


def run_of_one_row(num_tokens: int, **flags: Any) -> Run:
    return run_of(adapter="v1", attention="dense", seq_length=num_tokens, micro_batch_size=1, **flags)


def changes(run: Run, hardware: Hardware = A100):
    return smallest_changes(run, seven_b(), hardware, estimator=estimator(ladder_of_v1))


def test_every_change_that_keeps_the_run_fits_and_says_what_it_gives():
    run = run_of_one_row(60_000)
    before = ladder_of_v1(run)
    assert before["gpu"] > 38.5 * GIB
    found = changes(run)
    same = [change for change in found if change.is_same_run]
    assert same
    for change in same:
        assert change.needs["gpu"] <= 38.5 * GIB
        assert change.needs["host"] <= 96 * GIB
        assert change.saves["gpu"] == before["gpu"] - change.needs["gpu"]
    assert same[0].keys == {"sparse_llama.memory.loss_tile": 2048}
    assert same[0].flags == ("--loss_tile", "2048")


def test_the_cheapest_change_comes_first():
    """At 60,000 tokens under a checkpoint tiled logits fit, and cost nothing; streamed weights would too."""
    names = [change.flags[0] for change in changes(run_of_one_row(60_000)) if change.is_same_run]
    assert names[0] == "--loss_tile"
    assert names.index("--loss_tile") < names.index("--checkpointing") < names.index("--head_groups")
    assert "--zero_stage" not in names or names.index("--head_groups") < names.index("--zero_stage")


def test_smaller_micro_batches_are_proposed_before_more_work():
    run = run_of(adapter="v1", attention="dense", seq_length=2048, checkpointing="none")
    first = changes(run)[0]
    assert first.flags == ("--micro_batch_size", "2")
    assert first.keys == {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 32}


def test_where_no_single_change_fits_several_do_and_none_of_them_is_idle():
    run = run_of_one_row(240_000)
    found = [change for change in changes(run) if change.is_same_run]
    assert len(found) == 1
    (several,) = found
    assert len(several.keys) > 1
    assert several.needs["gpu"] <= 38.5 * GIB
    planner = Planner(seven_b(), A100, estimator=estimator(ladder_of_v1))
    flags = dict(zip(several.flags[::2], several.flags[1::2], strict=True))
    for left_out in flags:
        fewer = {name.removeprefix("--"): value for name, value in flags.items() if name != left_out}
        numbers = {name: int(value) if value.isdigit() else value for name, value in fewer.items()}
        assert not planner.fits(planner.at(run_of_one_row(240_000, **numbers))), left_out


def test_a_shorter_context_is_listed_last_and_called_another_experiment():
    for tokens in (60_000, 240_000, 10_000_000):
        found = changes(run_of_one_row(tokens))
        assert all(change.is_same_run for change in found[:-1])
        assert not found[-1].is_same_run
        assert "another experiment" in found[-1].sentence
        assert found[-1].flags[0] == "--seq_length"
        assert int(found[-1].flags[1]) < tokens


def test_short_of_host_memory_fewer_inputs_are_kept():
    run = run_of_one_row(200_000, checkpointing="cpu", loss_tile=2048, mlp_tile=2048, norm_tile=2048)
    found = changes(run, replace(A100, host_bytes=40 * GIB))
    assert found[0].flags == ("--number_checkpoints", "15")
    assert found[0].saves["host"] == (30 - 15) * 8192 * 200_000


def test_what_is_too_much_for_any_setting_says_so():
    planner = Planner(seven_b(), A100, estimator=estimator(ladder_of_v1))
    told = refusal(run_of_one_row(10_000_000), planner)
    assert "no setting of memory makes it fit" in told.message
    tiny = Planner(seven_b(), Hardware(4 * GIB, 4 * GIB), estimator=estimator(ladder_of_v1))
    told = refusal(run_of_one_row(4096), tiny)
    assert told.changes == ()
    assert "use a smaller base" in told.message


def test_a_refusal_is_one_line_with_the_need_the_budget_and_the_smallest_change(
    monkeypatch: pytest.MonkeyPatch,
):
    planner = Planner(seven_b(), A100, estimator=estimator(ladder_of_v1))
    told = refusal(run_of_one_row(60_000), planner)
    assert told.place == "gpu"
    assert "\n" not in told.message
    for part in ("48.7 GiB of GPU memory", "38.5 GiB can be used", "--loss_tile 2048"):
        assert part in told.message


@pytest.mark.parametrize(("tokens", "count"), [(100_000, None), (300_000, 4), (10_000_000, None)])
def test_head_groups_are_on_by_themselves_where_only_they_make_a_run_fit(tokens: int, count: int | None):
    """It stays off where the run fits without, and where no number of groups is enough."""
    planner = Planner(seven_b(), A100, estimator=estimator(ladder_of_v1))
    levers: dict[str, Any] = {"checkpointing": "cpu", "loss_tile": 2048, "mlp_tile": 2048, "norm_tile": 2048}
    run = run_of_one_row(tokens, **levers, head_groups="auto")
    settled = settle(run, planner)
    assert settled.settings == run_of_one_row(tokens, **levers, head_groups=count).settings
    assert len(settled.notices) == len(run.notices) + (count is not None)
    if count is not None:
        assert "GiB of GPU memory" in settled.notices[-1]
        assert not planner.fits(planner.at(run_of_one_row(tokens, **levers)))
    assert settle(settled, planner) is settled


def test_a_run_that_obviously_fits_is_not_traced(monkeypatch: pytest.MonkeyPatch):
    """The demo must not start later for being planned."""

    def traced(*_: object, **__: object) -> None:
        raise AssertionError("the closed form was not enough")

    monkeypatch.setattr(Planner, "at", traced)
    run = load_run(None, Overrides(output_dir=Path("nowhere")), 1, is_main=False)
    config = find_base(run.settings.model).config
    started = time.perf_counter()
    assert check_fits(run, Planner(config, Hardware(None, 8 * GIB))) is None
    assert time.perf_counter() - started < 0.05
    with pytest.raises(AssertionError, match="closed form"):
        check_fits(run_of(), Planner(seven_b(), A100))


def test_a_run_that_does_not_fit_is_refused():
    planner = Planner(seven_b(), A100, estimator=estimator(ladder_of_v1))
    assert check_fits(run_of_one_row(30_000), planner) is None
    refused = check_fits(run_of_one_row(60_000), planner)
    assert refused is not None
    assert refused.changes[0].flags == ("--loss_tile", "2048")


def test_short_of_everything_inputs_are_checkpointed_on_the_host_and_every_second_kept():
    """240,000 tokens on a host that holds the inputs of 20 layers."""
    hardware = replace(A100, host_bytes=2 * GIB + 20 * 8192 * 240_000)
    found = changes(run_of_one_row(240_000, checkpointing="none"), hardware)
    assert found[0].is_same_run
    flags = dict(zip(found[0].flags[::2], found[0].flags[1::2], strict=True))
    assert flags["--checkpointing"] == "cpu"
    assert flags["--number_checkpoints"] == "15"


PLAIN: list[dict[str, Any]] = [
    {"name": name, "adapter": adapter, "attention": attention, "checkpointing": "none"}
    for name in ("a100_40g", "cpu_demo")
    for adapter in ("v1", "v2")
    for attention in ("dense", "sparse")
]


@pytest.mark.parametrize("flags", PLAIN, ids=lambda flags: " ".join(flags.values()))
def test_no_estimate_is_above_the_upper_bound(flags: dict[str, Any]):
    """A run that the bound lets start is not traced: it must not need more than that, whatever it keeps."""
    run = run_of(**flags)
    config = find_base(run.settings.model).config
    for hardware in (A100, Hardware(None, 8 * GIB)):
        if hardware.device == "cpu" and flags["name"] != "cpu_demo":
            continue  # no CPU has the memory, and its estimate takes long
        for num_tokens in (64, 1024):
            asked = at_length(run, num_tokens)
            peak = max(estimate(asked, config, device=hardware.device).peak_bytes.values())
            assert peak <= upper_bound_bytes(asked, config, hardware, 1)
