"""The estimate at the shapes of LLaMA-7B against formulas, and DeepSpeed's part against its rules."""

from typing import Any

import pytest
import torch
from planned_runs import FIXED, LLAMA_7B, SMALL, document, llama, run_of
from transformers import LlamaForCausalLM

from sparse_llama.config.run import Run
from sparse_llama.planning.estimate import LIBRARY_BYTES, Estimate, estimate
from sparse_llama.planning.phases import size_of
from sparse_llama.planning.planned_step import PlannedStep, make_batch, plan_step

C, F, H, V = 4096, 11_008, 32, 32_000
LAYER = 2 * (4 * C * C + 3 * C * F + 2 * C)
WEIGHTS = 32 * LAYER + 2 * (2 * V * C + C)  # bytes, bf16
HOST = {"cpu_checkpointing": True}
TILES = {"norm_tile": 4096, "mlp_tile": 4096, "loss_tile": 4096}


def plan_7b(tmp_path: Any, *args: Any, **settings: Any) -> Estimate:
    return estimate(run_of(tmp_path, document(*args, **settings)), llama(LLAMA_7B), device="cuda")


def step_7b(tmp_path: Any, num_tokens: int, version: str, **settings: Any) -> PlannedStep:
    run = run_of(tmp_path, document(num_tokens, version, **settings))
    return plan_step(run, llama(LLAMA_7B), "cuda", make_batch(1, num_tokens, None, None))


def test_v1_keeps_what_the_frozen_base_keeps(tmp_path):
    """Memory trap 17: a slope that drifts when transformers changes a module shows here. Per token and layer:
    two norms' fp32 copies of their input and inverse roots, q, k, v and o, the lse, and three of the MLP."""
    expected = 2 * (4 * C + 4) + 8 * C + 4 * H + 6 * F
    assert expected == 131_720
    prompt = 2 * 10 * C * 2  # its keys and values, whatever the row's length
    assert plan_7b(tmp_path, 4096, "v1").saved_bytes_per_token_and_layer == expected + prompt / 4096


def test_stage_3_keeps_the_input_of_every_linear_layer(tmp_path):
    """DeepSpeed's linear function saves it, though a frozen weight needs it for nothing: both norms' outputs
    and the MLP's product. The attention's output is there already."""
    zero = {"stage": 3, "stage3_prefetch_bucket_size": 0}
    plain, stage3 = (
        plan_7b(tmp_path, 4096, "v1", zero_optimization=block).saved_bytes_per_token_and_layer
        for block in ({"stage": 0}, zero)
    )
    assert stage3 - plain == 2 * 2 * C + 2 * F
    plain = plan_7b(tmp_path, 4096, "v1", zero_optimization=zero | {"memory_efficient_linear": False})
    assert stage3 - plain.saved_bytes_per_token_and_layer == 2 * 2 * C + 2 * F


def test_v2_keeps_no_more_than_v1(tmp_path):
    """Memory trap 4: plain autograd would keep 235,016 bytes."""
    assert plan_7b(tmp_path, 4096, "v2").saved_bytes_per_token_and_layer <= 131_720


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("memory", [{}, TILES, TILES | {"head_groups": 4}], ids=["", "tiles", "head groups"])
def test_a_checkpointed_layer_keeps_its_input(version, memory, tmp_path):
    made = plan_7b(tmp_path, 8192, version, checkpointing=HOST, memory=memory)
    assert made.saved_bytes_per_token_and_layer == 2 * C


@pytest.mark.parametrize(("version", "num_layers"), [("v1", 30), ("v2", 32)])
def test_the_host_holds_every_trained_layers_input_and_no_more(version, num_layers, tmp_path):
    """Memory trap 6: a hook that asks whether a tensor requires grad leaves the lowest input on the GPU."""
    made = plan_7b(tmp_path, 8192, version, checkpointing=HOST, memory=TILES)
    assert made.components["host"]["layer inputs"] == num_layers * 8192 * 2 * C
    assert made.traffic_bytes.gpu_to_host == num_layers * 8192 * 2 * C


def test_a_checkpoint_every_two_layers_halves_the_host(tmp_path):
    settings = {"checkpointing": HOST | {"number_checkpoints": 16}, "memory": TILES}
    made = plan_7b(tmp_path, 8192, "v2", **settings)
    assert made.components["host"]["layer inputs"] == 16 * 8192 * 2 * C


def test_inputs_on_the_drive_are_on_the_drive(tmp_path):
    memory = TILES | {"checkpoint_nvme_path": str(tmp_path)}
    made = plan_7b(tmp_path, 8192, "v2", checkpointing=HOST, memory=memory)
    assert made.peak_bytes["disk"] == 32 * 8192 * 2 * C
    assert made.traffic_bytes.host_to_disk == 32 * 8192 * 2 * C
    assert list(tmp_path.iterdir()) == [tmp_path / "run.json"]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_intercept_is_the_weights(version, tmp_path):
    """What does not grow with the tokens is the base and 16 bytes for each trained number."""
    first, second = (
        plan_7b(tmp_path, tokens, version, checkpointing=HOST, memory={"loss_tile": 256}).peak_bytes["gpu"]
        for tokens in (16_384, 32_768)
    )
    assert 2 * first - second == pytest.approx(WEIGHTS, rel=0.01)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("groups", "most"), [(None, 13.2), (4, 6.5)])
def test_one_layers_backward_pass(version, groups, most, tmp_path):
    """Memory trap 3, in token-by-width tensors of the model's type: 13 of a checkpointed layer in tiles, two
    of them flash's fp32 gradient of the queries; with c groups of heads 4 + 8 / c. Transformers' own norms
    alone would take 20. The lowest layer fetches no other's input meanwhile."""
    tokens = 131_072
    memory = {"norm_tile": 2048, "mlp_tile": 2048, "loss_tile": 2048, "head_groups": groups}
    step = step_7b(tmp_path, tokens, version, checkpointing=HOST, memory=memory)
    lowest = [phase for phase in step.phases if phase.label == "backward"][-1]
    held = sum(
        size
        for kind, size in lowest.peaks["gpu"].items()
        if kind.place == "gpu" and kind.component in ("weights", "adapters", "gradients")
    )
    assert (size_of(lowest.peaks["gpu"], "gpu") - held) / (tokens * 2 * C) <= most


def test_no_long_fp32_tensor_but_flashs_own(tmp_path):
    made = plan_7b(tmp_path, 65_536, "v1", checkpointing=HOST, memory=TILES)
    wide = [one for one in made.alive if one.dtype == "float32" and one.num_bytes >= 65_536 * 2 * C]
    assert wide == []


@pytest.mark.parametrize("sparsity", [None, FIXED | {"block": 64}], ids=["dense", "sparse"])
def test_components_and_tensors_add_up(sparsity, tmp_path):
    blocks = {} if sparsity is None else {"sparse_attention": sparsity}
    made = plan_7b(tmp_path, 8192, "v2", checkpointing=HOST, memory=TILES, **blocks)
    for place, parts in made.components.items():
        assert sum(parts.values()) == made.peak_bytes[place]
        assert all(size > 0 for size in parts.values())
    assert sum(one.num_bytes for one in made.alive) == made.peak_bytes["gpu"]
    assert all(one.count * (one.num_bytes // one.count) == one.num_bytes for one in made.alive)
    assert ("attention tables" in made.components["gpu"]) is (sparsity is not None)


def test_twice_the_micro_steps_are_twice_the_work(tmp_path):
    config = llama(SMALL)
    once = run_of(tmp_path, document(256, checkpointing=HOST))
    twice = run_of(tmp_path, document(256, checkpointing=HOST, gradient_accumulation_steps=2))
    first, second = (estimate(run, config, device="cuda") for run in (once, twice))
    assert second.flops == 2 * first.flops
    assert second.traffic_bytes.gpu_to_host == 2 * first.traffic_bytes.gpu_to_host


def test_documents_and_labels_are_the_batchs(tmp_path):
    config, run = llama(SMALL), run_of(tmp_path, document(512, precision="fp32"))
    whole = estimate(run, config, device="cuda")
    parts = estimate(run, config, device="cuda", document_lengths=[100, 412])
    few = estimate(run, config, device="cuda", num_labelled=16)
    assert parts.flops < whole.flops
    assert few.components["gpu"].get("logits and loss", 0) < whole.components["gpu"]["logits and loss"] / 8


def test_ranks_that_share_rows_share_their_tokens(tmp_path):
    """Two ranks of Ulysses: a layer's input is half as long on each, attention sees the whole row."""
    config = llama(SMALL, num_key_value_heads=4)
    alone = run_of(tmp_path, document(4096, "v2", checkpointing=HOST))
    shared = run_of(tmp_path, document(4096, "v2", checkpointing=HOST, sequence_parallel_size=2), 2)
    one, half = estimate(alone, config, device="cuda"), estimate(shared, config, device="cuda", ranks=2)
    assert half.components["host"]["layer inputs"] == one.components["host"]["layer inputs"] / 2
    assert half.saved_bytes_per_token_and_layer == one.saved_bytes_per_token_and_layer
    assert half.flops == pytest.approx(one.flops / 2, rel=0.01)


@pytest.mark.parametrize("backend", ["auto", "flex", "reference"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_backend_of_a_gpu_can_be_planned(backend, precision, tmp_path):
    made = document(256, "v2", precision=precision, sparse_attention=FIXED)
    made["sparse_llama"]["attention"] = {"backend": backend}
    run = run_of(tmp_path, made)
    planned = estimate(run, llama(SMALL), device="cuda")
    # T x T scores are of the reference's alone
    is_square = any(one.shape[-2:] == (256, 256) for one in planned.alive)
    assert is_square is (backend == "reference")


def small(tmp_path: Any, stage: int, **zero: Any) -> tuple[Run, Estimate]:
    block = {"stage": stage, "reduce_bucket_size": 10_000_000} | zero
    run = run_of(tmp_path, document(256, "v2", checkpointing={}, zero_optimization=block), 4)
    return run, estimate(run, llama(SMALL), device="cuda", ranks=4)


def test_stages_1_and_2_change_the_adapters_part_alone(tmp_path):
    """A frozen base has no gradients and no optimizer state to divide."""
    weights = {stage: small(tmp_path, stage)[1].components["gpu"]["weights"] for stage in (0, 1, 2)}
    assert len(set(weights.values())) == 1
    optimizer = {stage: small(tmp_path, stage)[1].components["gpu"]["optimizer"] for stage in (0, 1, 2)}
    assert optimizer[1] == optimizer[2] == pytest.approx(optimizer[0] / 4, rel=0.01)


def test_the_reduction_buckets_are_of_the_configured_size(tmp_path):
    """DeepSpeed takes them whole, however little there is to reduce."""
    for stage, overlaps, count in ((1, False, 1), (2, True, 2), (3, True, 1)):
        _, made = small(tmp_path, stage, overlap_comm=overlaps)
        assert made.components["gpu"]["DeepSpeed's buffers"] == count * 2 * 10_000_000


def test_a_document_that_names_no_size_gets_buckets_as_large_as_the_adapter(tmp_path):
    """DeepSpeed's default of 5e8 elements takes 1 GB for them."""
    numel = 10 * (10 * 64 + 4)  # ten layers with ten prompts of 64 and a gate for each of four heads
    for size in ({}, {"reduce_bucket_size": "auto"}):
        run = run_of(tmp_path, document(256, "v1", zero_optimization={"stage": 3} | size))
        made = estimate(run, llama(SMALL), device="cuda")
        assert made.components["gpu"]["DeepSpeed's buffers"] == 2 * numel


def test_stage_3_divides_the_weights_among_ranks(tmp_path):
    limits = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    _, whole = small(tmp_path, 0)
    _, divided = small(tmp_path, 3, stage3_param_persistence_threshold=0, **limits)
    (part,) = (one for one in divided.alive if one.name == "this rank's part")
    config = llama(SMALL)
    with torch.device("meta"):
        numel = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    assert numel / 4 * 2 < part.num_bytes < numel / 4 * 2 * 1.1  # and the adapter
    assert divided.components["gpu"]["weights"] < whole.components["gpu"]["weights"]


def test_streamed_weights_are_on_the_host(tmp_path):
    """Pinned, in one block a tensor, which torch's pinned allocator rounds up to a power of two."""
    zero = {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
        "reduce_bucket_size": 10_000_000,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 300_000_000,
    }
    made = plan_7b(tmp_path, 8192, "v1", checkpointing=HOST, memory=TILES, zero_optimization=zero)
    rounded = 32 * (4 * 2**25 + 3 * 2**27) + 2 * 2**28
    assert made.components["host"]["weights"] == pytest.approx(rounded, rel=0.001)
    # on the GPU what is fetched ahead, the layer at hand, small parameters, and the head while it is in use
    assert made.components["gpu"]["weights"] < 2 * 300_000_000 + LAYER + 2 * V * C + 2**22
    assert made.traffic_bytes.host_to_gpu > 2 * 32 * LAYER


def test_on_a_cpu_everything_is_on_the_host(tmp_path):
    run = run_of(tmp_path, document(256, "v2", precision="fp32"))
    made = estimate(run, llama(SMALL), device="cpu")
    assert set(made.peak_bytes) == {"host"}
    assert made.components["host"]["libraries"] == LIBRARY_BYTES["cpu"]


def test_an_estimate_ends_a_cpu_builds_process_well(tmp_path, run_python):
    """Memory trap 15: a fake CUDA tensor in an autograd graph terminates the process, past any ``except``."""
    run_of(tmp_path, document(512, "v2", checkpointing=HOST, memory=TILES))
    source = f"""
from pathlib import Path
from planned_runs import SMALL, llama
from sparse_llama.config.run import Overrides, load_run
from sparse_llama.planning.estimate import estimate
run = load_run(Path({str(tmp_path / "run.json")!r}), Overrides(), 1)
print(estimate(run, llama(SMALL), device="cuda").peak_bytes["gpu"])
"""
    assert int(run_python(source).splitlines()[-1]) > 0
