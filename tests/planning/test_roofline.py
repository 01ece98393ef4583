"""A step's time is worked out by hand from rates that are said to be a model."""

from dataclasses import replace

import pytest
from shipped_runs import estimator, run_of, seven_b

from sparse_llama.config.run import Run
from sparse_llama.planning.estimate import Estimate, Traffic
from sparse_llama.planning.levers import checkpoint, combine, number_checkpoints
from sparse_llama.planning.roofline import plan_of, step_time
from sparse_llama.reporting.expectation import Work
from sparse_llama.reporting.rates import A100, RATES, rates_of

T = 65536


def made(run: Run, flops: float = 0.0, traffic: Traffic | None = None) -> Estimate:
    estimate = estimator(lambda _: {"gpu": 0})(run, seven_b())
    return replace(estimate, flops=flops, traffic_bytes=traffic or Traffic())


def dense_run(**flags) -> Run:
    """Return the run of a 7B in micro-batches of one row of T tokens, two to a step."""
    run = run_of(attention="dense", seq_length=T, **flags)
    deepspeed = run.deepspeed | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    return replace(run, deepspeed=deepspeed | {"train_batch_size": 2})


def test_dense_attention_runs_twice_forward_under_a_checkpoint_and_backward_costs_two_and_a_half():
    """v1 from layer 2 on: layers 0 and 1 run forward once, the other thirty forward twice and backward."""
    run = dense_run(adapter="v1")
    pairs = 2 * T * (T + 1) / 2
    layer = 4 * 32 * 128 * pairs
    expected = layer * (30 * (2 / 195e12 + 2.5 / 170e12) + 2 / 195e12)
    time = step_time(run, seven_b(), made(run), A100)
    assert time.attention_s == pytest.approx(expected, rel=1e-9)
    assert time.linear_s == 0.0


def test_what_is_not_attention_is_matrix_products():
    run = dense_run(adapter="v2")
    attention = 4 * 4096 * (2 * T * (T + 1) / 2) * 32 * 4.5
    time = step_time(run, seven_b(), made(run, flops=attention + 230e12), A100)
    assert time.linear_s == pytest.approx(1.0, rel=1e-6)


def test_a_nested_checkpoint_runs_forward_half_a_time_more():
    run = dense_run(adapter="v2")
    nested = combine((checkpoint("cpu"), number_checkpoints(2, 32))).apply(run)
    more = step_time(nested, seven_b(), made(run), A100).attention_s
    more -= step_time(run, seven_b(), made(run), A100).attention_s
    assert more == pytest.approx(0.5 * 32 * 4 * 4096 * (T * (T + 1)) / 195e12, rel=1e-9)


def test_without_a_checkpoint_a_layer_runs_forward_once():
    run = dense_run(adapter="v2", checkpointing="none")
    expected = 32 * 4 * 4096 * T * (T + 1) * (1 / 195e12 + 2.5 / 170e12)
    assert step_time(run, seven_b(), made(run), A100).attention_s == pytest.approx(expected, rel=1e-9)


def test_sparse_attention_takes_the_share_of_its_pairs_at_the_rate_of_its_kernels():
    run = run_of("a100_40g_32k", adapter="v2")
    share = plan_of(run, seven_b()).density_at(32768)
    assert share == pytest.approx(0.127, abs=0.0005)  # as the document says
    pairs = 8 * 32768 * 32769 / 2
    expected = share * 32 * 4 * 4096 * pairs * (2 / 160e12 + 2.5 / 120e12)
    assert step_time(run, seven_b(), made(run), A100).attention_s == pytest.approx(expected, rel=1e-9)


def test_dense_layers_beside_sparse_ones_are_timed_as_dense():
    """Of 32 layers 2 are dense: their pairs are all, at the rate of flash attention."""
    run = run_of("a100_40g_32k", adapter="v2")
    mixed = replace(run, layouts=replace(run.layouts, dense_layers=(0, -1)))
    sparse_s, mixed_s = (step_time(one, seven_b(), made(run), A100).attention_s for one in (run, mixed))
    pairs = 8 * 32768 * 32769 / 2
    dense_layer_s = 4 * 4096 * pairs * (2 / 195e12 + 2.5 / 170e12)
    assert mixed_s == pytest.approx(30 / 32 * sparse_s + 2 * dense_layer_s, rel=1e-9)


def test_a_whole_eager_layer_achieves_what_the_notes_of_the_rates_say():
    """405 MFLOP a token and layer at 230e12, and element by element at the memory's rate: 185e12 in all."""
    run = dense_run(adapter="v1", checkpointing="none")
    time = step_time(run, seven_b(), made(run), A100)
    products = 2 * T * 30 * 3 * 2 * (4 * 4096**2 + 3 * 4096 * 11008)  # forward and backward as two, 30 layers
    achieved = products / (products / A100.linear + time.elementwise_s)
    assert achieved == pytest.approx(185e12, rel=0.03)


def test_traffic_is_beside_the_computing_and_the_longest_is_the_step():
    run = dense_run()
    out, back, drive = 25_000_000_000, 50_000_000_000, 3_000_000_000
    few = step_time(run, seven_b(), made(run, traffic=Traffic(out, back, drive, drive)), A100)
    assert (few.to_host_s, few.from_host_s, few.disk_s) == (1.0, 2.0, 2.0)
    assert few.total_s == few.compute_s > 2
    assert few.binds == "the GPU computes"
    many = step_time(run, seven_b(), made(run, traffic=Traffic(host_to_gpu=10**13)), A100)
    assert (many.total_s, many.binds) == (400.0, "the bus to host memory")
    drive = step_time(run, seven_b(), made(run, traffic=Traffic(host_to_disk=3 * 10**12)), A100)
    assert (drive.total_s, drive.binds) == (1000.0, "the drive")


def test_sequence_parallel_ranks_share_the_pairs_and_the_tokens():
    whole, shared = dense_run(), dense_run()
    shared = replace(shared, deepspeed=shared.deepspeed | {"sequence_parallel_size": 8})
    alone, among = (step_time(run, seven_b(), made(run), A100) for run in (whole, shared))
    assert among.attention_s == pytest.approx(alone.attention_s / 8)
    assert among.elementwise_s == pytest.approx(alone.elementwise_s / 8)
    assert among.num_tokens == alone.num_tokens


def test_the_layouts_command_and_the_plan_take_the_same_rates():
    """Attention's part of the step that ``show_layout`` expects is this one's."""
    run = dense_run(adapter="v2")
    work = Work(T, T * (T + 1) // 2, ((1.0, 1.0),))
    limit = work.step_limit()  # 1 + attention over linear
    linear_s = 3 * T * 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000) / A100.linear
    attention_s = step_time(run, seven_b(), made(run), A100).attention_s / 2  # two rows to a step
    assert attention_s / linear_s == pytest.approx(limit - 1, rel=1e-3)


def test_a_gpu_is_known_by_the_name_that_pytorch_gives_it():
    assert rates_of("NVIDIA A100-SXM4-40GB") is RATES["a100"]
    assert rates_of("NVIDIA H100 80GB HBM3") is RATES["h100"]
    assert rates_of("NVIDIA GeForce RTX 4090") is RATES["rtx4090"]
    assert rates_of("CPU x86_64, 2 threads") is None
