"""The ladder, the next lever and the furthest settings, by the measured ladder of v1."""

from dataclasses import replace

import pytest
from shipped_runs import A100, U, estimator, ladder_of_v1, run_of, seven_b

from sparse_llama.config.run import Run
from sparse_llama.planning.hardware import GIB, Hardware
from sparse_llama.planning.plan import climb, ladder_to_json, make_plan, next_lever, plan_to_json, reach
from sparse_llama.planning.search import Planner
from sparse_llama.reporting.rates import A100 as A100_RATES

WEIGHTS = 13_476_000_000
USABLE = 38.5 * GIB


def planner(hardware: Hardware = A100) -> Planner:
    return Planner(seven_b(), hardware, estimator=estimator(ladder_of_v1))


def one_row(**flags) -> Run:
    return run_of(adapter="v1", attention="dense", micro_batch_size=1, **flags)


def test_every_rung_reaches_where_its_slope_crosses_the_budget():
    """With the host no limit: 6 thousand tokens without a lever, 43 thousand checkpointed, as measured."""
    rungs = climb(one_row(), planner(replace(A100, host_bytes=1000 * GIB)))
    reached = [one.longest.num_tokens for one in rungs]
    slopes = [
        4_369_032,
        646_684,
        646_684 - 23.5 * U,
        646_684 - 29.6 * U,
        646_684 - 35.9 * U,
        646_684 - 65.8 * U,
    ]
    slopes += [7.4 * U, 6.4 * U]
    for tokens, slope in zip(reached[:8], slopes, strict=True):
        assert tokens == pytest.approx((USABLE - WEIGHTS) / slope, rel=0.011)
    assert reached[8] == pytest.approx((USABLE - 1_440_000_000) / slopes[5], rel=0.011)
    assert reached[9] == pytest.approx((USABLE - 1_440_000_000) / slopes[7], rel=0.011)
    assert reached[0] == pytest.approx(6_372, rel=0.02)
    assert reached[1] == pytest.approx(43_086, rel=0.02)


def test_rows_of_a_micro_batch_share_what_there_is():
    few, many = (
        climb(run_of(adapter="v1", attention="dense", micro_batch_size=n), planner()) for n in (1, 4)
    )
    assert many[1].longest.num_tokens == pytest.approx(few[1].longest.num_tokens / 4, rel=0.02)


def test_the_furthest_settings_keep_fewer_inputs_where_the_host_is_short():
    """On 96 GiB every layer's input stops the last rungs at 400 thousand tokens; every second goes on."""
    made = planner()
    rungs = climb(one_row(), made)
    furthest = reach(rungs, made)
    assert furthest is not None
    assert furthest.run.checkpointing is not None
    assert furthest.run.checkpointing.number_checkpoints is not None
    assert furthest.longest.num_tokens > 1.2 * max(one.longest.num_tokens for one in rungs[:10])
    assert furthest.longest.estimate is not None
    assert made.fits(furthest.longest.estimate)
    assert furthest.lever.apply(one_row()).checkpointing == furthest.run.checkpointing


def test_of_settings_that_reach_as_far_the_first_is_taken():
    """A host of 3 GiB holds no inputs: what needs it is no further than the rung before it."""
    made = planner(replace(A100, host_bytes=3 * GIB))
    furthest = reach(climb(one_row(), made), made)
    assert furthest is not None
    assert furthest.rung.number < 8
    nothing = planner(Hardware(3 * GIB, 3 * GIB))
    assert reach(climb(one_row(), nothing), nothing) is None


def test_the_next_lever_is_the_cheapest_that_reaches_further_and_says_how_far():
    made, run = planner(), one_row()
    longest = made.longest(run)
    following = next_lever(run, made, longest)
    assert following is not None
    assert following.lever.flags == ("--loss_tile", "2048")
    assert following.longest.num_tokens == pytest.approx((USABLE - WEIGHTS) / (646_684 - 23.5 * U), rel=0.011)


def test_a_lever_of_a_place_that_does_not_bind_is_not_next():
    """The host is full: smaller tiles on the GPU give nothing, fewer inputs do."""
    made = planner(replace(A100, host_bytes=12 * GIB))
    run = one_row(checkpointing="cpu")
    following = next_lever(run, made, made.longest(run))
    assert following is not None
    assert following.lever.flags[0] == "--number_checkpoints"


def test_a_plan_says_what_would_fit_only_where_it_does_not():
    fitting = make_plan(one_row(seq_length=4096), planner(), A100_RATES)
    assert fitting.fits
    assert fitting.changes == ()
    assert fitting.time is not None
    too_long = make_plan(one_row(seq_length=65536), planner(), None)
    assert not too_long.fits
    assert too_long.changes
    assert too_long.time is None


def test_a_plan_as_json_holds_every_figure():
    made = planner()
    plan = make_plan(one_row(seq_length=4096), made, A100_RATES)
    written = plan_to_json(plan, made)
    assert written["needs_bytes"]["gpu"] == WEIGHTS + 646_684 * 4096
    assert written["usable_bytes"]["gpu"] == USABLE
    assert written["longest"] == {"num_tokens": plan.longest.num_tokens, "binds": "gpu"}
    rungs = ladder_to_json(climb(one_row(), made), made)
    assert rungs[5]["flags"][:2] == ["--checkpointing", "cpu"]
    assert rungs[5]["flags"].count("--checkpointing") == 1
    assert all(one["needs_bytes"]["gpu"] <= USABLE for one in rungs)


@pytest.mark.slow
def test_the_ladder_at_7b_shapes_is_the_one_that_was_measured():
    """v1, dense, by another program: an allocation trace of transformers' own modules under the same levers.
    From rung 5 on one input is fetched ahead, 1 u more than there; 1.44 GB of weights are live when streamed,
    and stage 3's linear functions keep the input of q, k and v, which head groups do not use."""
    made = Planner(seven_b(), replace(A100, host_bytes=2000 * GIB))
    reached = [one.longest.num_tokens for one in climb(one_row(), made)]
    measured = [6_372, 43_086, 61_348, 68_968, 78_000]
    measured += [(USABLE - WEIGHTS) / (u * U) for u in (13.1 + 1, 6.47 + 1, 5.33 + 1)]
    measured += [(USABLE - 1_440_000_000) / (u * U) for u in (13.1 + 2, 5.33 + 1)]
    assert reached[:10] == pytest.approx(measured, rel=0.05)
