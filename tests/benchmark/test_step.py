"""A training step beside plain transformers and PEFT: who trains what, over which base, and what is told."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from sparse_llama import cli
from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.benchmark import llamas
from sparse_llama.benchmark.llamas import PLAIN, adapt, copy_over, random_llama
from sparse_llama.benchmark.shapes import Shape
from sparse_llama.benchmark.step import (
    StepGroup,
    StepSizes,
    TrainingStep,
    check_contender,
    measure_steps,
    prepare_steps,
)
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import ModelError

CPU = torch.device("cpu")
L, C, H, K, D, F, V, P, RANK = 4, 32, 4, 2, 8, 48, 61, 10, 8
SIZES = StepSizes(
    Shape(L, C, H, K, D, F, V),
    num_tokens=12,
    num_rows=2,
    top_layers=1,
    checkpointing=(False, True),
    dtype=torch.float32,
    repeats=3,
    warm_up_s=0.0,
)
OURS = [PLAIN, "v1", "v2", "v2, top 1 of 4"]
PEFT = ["PEFT adaption prompt", "PEFT LoRA, q and v", "PEFT LoRA, all linear"]


def base_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return random_llama(SIZES.shape, num_tokens=SIZES.num_tokens, dtype=dtype, device=CPU)


def rows() -> torch.Tensor:
    return torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(4))


@cache
def measured(is_checkpointed: bool) -> StepGroup:
    steps, _ = prepare_steps(SIZES, CPU)
    return measure_steps(steps, SIZES, is_checkpointed=is_checkpointed, device=CPU)


@pytest.fixture(autouse=True)
def _has_peft() -> None:
    pytest.importorskip("peft")


def test_each_contender_trains_exactly_its_own():
    linear = {"q": (C, H * D), "k": (C, K * D), "v": (C, K * D), "o": (H * D, C)}
    linear |= {"gate": (C, F), "up": (C, F), "down": (F, C)}
    v1_layer = P * C + H
    v2_layer = 2 * sum(out for _, out in linear.values()) + 2 * C  # scales, biases, two norms
    head = 2 * V + C  # scale and bias, and the last norm
    lora = {name: RANK * (ins + outs) for name, (ins, outs) in linear.items()}
    assert {one.name: one.trainable_parameters for one in measured(False).costs} == {
        PLAIN: 0,
        "v1": 2 * v1_layer,
        "v2": 2 * v1_layer + L * v2_layer + head,
        "v2, top 1 of 4": v1_layer + v2_layer + head,
        "PEFT adaption prompt": 2 * (P * C + 1),
        "PEFT LoRA, q and v": L * (lora["q"] + lora["v"]),
        "PEFT LoRA, all linear": L * sum(lora.values()),
    }


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_ratios_and_tokens_a_second_are_those_of_the_median_step(is_checkpointed: bool):
    group = measured(is_checkpointed)
    assert group.is_checkpointed == is_checkpointed
    plain = group.costs[0]
    assert (plain.name, plain.ratio) == (PLAIN, 1.0)
    for one in group.costs:
        step_ms = one.times["both"].median_ms
        assert one.ratio == step_ms / plain.times["both"].median_ms
        assert one.tokens_per_s == pytest.approx(2 * 12 / (step_ms / 1000))


def test_untrained_contenders_have_the_logits_of_the_base():
    assert max(one.error for one in measured(False).costs) < 1e-6


def test_a_contender_that_begins_elsewhere_is_refused():
    base = base_llama()
    moved = copy_over(base)
    adapt(moved, AdapterSettings(version="v1"))
    for name, parameter in trainable_parameters(moved):
        if name.endswith("gate"):
            parameter.data += 1.0
    with pytest.raises(
        ModelError, match=r"moved: its logits differ from the base's by .* before any training"
    ):
        check_contender("moved", moved, base, rows())


def test_a_contender_with_a_tensor_that_no_gradient_reaches_is_refused():
    base = base_llama()
    idle = copy_over(base)
    idle.model.embed_tokens.register_parameter("idle", torch.nn.Parameter(torch.zeros(2)))
    idle.model.norm.weight.requires_grad_(True)
    with pytest.raises(ModelError, match="idle: gradients reach 1 tensors, 2 are meant to train"):
        check_contender("idle", idle, base, rows())


def test_contenders_share_the_weights_and_training_leaves_them_as_they_were():
    base = base_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found, _ = llamas.contenders(base, top_layers=1)
    for name, llama in found.items():
        check_contender(name, llama, base, rows())
        assert up_projection(llama).data_ptr() == up_projection(base).data_ptr()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def up_projection(llama: LlamaForCausalLM) -> torch.Tensor:
    layer: Any = llama.model.layers[0]
    return layer.mlp.up_proj.weight


@pytest.mark.parametrize(("name", "lowest"), [(PLAIN, 0), ("v1", 2), ("v2", 0), ("v2, top 1 of 4", 3)])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_backward_pass_reaches_down_to_the_lowest_layer_that_trains_and_all_layers_of_the_plain_model(
    name: str, lowest: int, is_checkpointed: bool
):
    steps, _ = prepare_steps(SIZES, CPU)
    (step,) = (one for one in steps if one.name == name)
    step.checkpoint(is_checkpointed)
    reached: set[int] = set()
    for index, layer in enumerate(step.llama.model.layers):
        assert layer.gradient_checkpointing == (is_checkpointed and index >= lowest)

        def watch(_module, _args, output: torch.Tensor, index: int = index) -> None:
            if output.requires_grad:
                output.register_hook(lambda _grad: reached.add(index))

        layer.register_forward_hook(watch)
    step.backward(step.forward())
    assert reached == set(range(lowest, L))


def test_steps_too_small_for_bf16_add_up():
    llama = copy_over(base_llama(torch.bfloat16))
    adapt(llama, AdapterSettings(version="v2"))
    for _, parameter in trainable_parameters(llama):
        parameter.data = parameter.data.bfloat16()
    step = TrainingStep("v2", llama, rows())
    scales = [one for name, one in trainable_parameters(llama) if name.endswith("q_proj.adapter_scale")]
    assert scales
    for _ in range(50):  # 1e-4 each, where bf16 has 1 - 0.0039 and 1 + 0.0078 beside 1
        step.backward(step.forward())
    assert all(bool((one != 1).any()) for one in scales)


def test_without_peft_its_contenders_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llamas, "find_spec", lambda name: None)
    steps, left_out = prepare_steps(SIZES, CPU)
    assert [step.name for step in steps] == OURS
    assert left_out == dict.fromkeys(PEFT, "peft is not installed; pip install peft")


def test_the_command_prints_a_table_and_saves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(llamas, "find_spec", lambda name: None)
    asked = ["step", "--shape", "small", "--seq_length", "16", "--checkpointing", "on", "--repeats", "1"]
    cli.main(cli.benchmark, cli.benchmark_parser("doc"), [*asked, "--output_dir", str(tmp_path)])
    saved = json.loads((tmp_path / "step_cpu.json").read_text(encoding="utf-8"))
    assert saved["sizes"]["num_tokens"] == 16
    assert saved["sizes"]["dtype"] == "float32"
    assert saved["provenance"]["hardware"]
    assert list(saved["left_out"]) == PEFT
    (group,) = saved["groups"]
    assert group["is_checkpointed"] is True
    assert [one["name"] for one in group["costs"]] == OURS
    shown = capsys.readouterr().out
    text = (tmp_path / "step_cpu.md").read_text(encoding="utf-8")
    for one in group["costs"]:
        assert re.search(rf"{one['name']} +{one['trainable_parameters']:,} .* {one['ratio']:.3f} ", shown)
        assert f"| {one['name']} | {one['trainable_parameters']:,} | " in text
    assert "this takes about " in shown
    assert "not measured: PEFT adaption prompt; peft is not installed" in shown
    assert "* Not measured: PEFT adaption prompt; peft is not installed; pip install peft." in text
    assert "## With checkpointing" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq_length", "1"], "--seq_length: 1 token predicts none; use 2 or more"),
        (["--batch", "0"], "--batch: must be 1 or more, got 0"),
        (["--top_layers", "0"], "--top_layers: must be 1 or more, got 0"),
        (
            ["--shape", "small", "--top_layers", "4"],
            "--top_layers: 4 leaves none of the 4 layers of --shape small out; use at most 3",
        ),
        (["--dtype", "float16"], "--dtype: float16 trains with loss scaling only, .* use bfloat16"),
        (["--lengths", "64"], "--lengths: belongs to attention, layer and memory; step does not take it"),
        (["--width", "64"], "--width: belongs to layer; step does not take it"),
        (["--checkpointing", "maybe"], "argument --checkpointing: invalid choice"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        cli.main(
            cli.benchmark, cli.benchmark_parser("doc"), ["step", *arguments, "--output_dir", str(tmp_path)]
        )
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: {message}", said), said
