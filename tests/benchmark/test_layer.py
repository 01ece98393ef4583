"""A decoder layer with adapters beside the plain one: what is compared, and what it keeps."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparse_llama import cli
from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.benchmark import layer as layer_module
from sparse_llama.benchmark.layer import (
    AGAIN,
    LayerGroup,
    LayerSizes,
    estimate_s,
    kept_bytes,
    measure_layers,
    prepare_layers,
)
from sparse_llama.benchmark.llamas import PLAIN
from sparse_llama.benchmark.shapes import SHAPES, Shape
from sparse_llama.benchmark.timing import Timing

CPU = torch.device("cpu")
SIZES = LayerSizes(
    Shape(1, 32, 4, 2, 8, 48, 2),
    lengths=(24, 12),
    training_lengths=(12,),
    dtype=torch.float32,
    repeats=3,
    long_repeats=2,
    warm_up_s=0.0,
)
TINY = ["--width", "32", "--heads", "4", "--kv_heads", "2", "--mlp_width", "48", "--repeats", "2"]


@cache
def measured(num_tokens: int, is_training: bool) -> LayerGroup:
    layers = prepare_layers(SIZES, CPU)
    return measure_layers(layers, SIZES, num_tokens=num_tokens, is_training=is_training, device=CPU)


def test_inference_and_training_of_a_length_are_cases_of_their_own():
    assert SIZES.cases == [(12, False), (12, True), (24, False)]


@pytest.mark.parametrize(("num_tokens", "is_training"), SIZES.cases)
def test_ratios_are_those_of_the_medians(num_tokens: int, is_training: bool):
    group = measured(num_tokens, is_training)
    assert [one.name for one in group.costs] == [PLAIN, "v1", "v2", AGAIN]
    plain = group.costs[0]
    for one in group.costs:
        assert set(one.times) == ({"forward", "backward", "both"} if is_training else {"forward"})
        expected = {which: one.times[which].median_ms / plain.times[which].median_ms for which in one.times}
        assert one.ratio == expected


def test_a_layer_keeps_something_in_training_and_nothing_in_inference():
    assert all(one.kept_bytes_per_token is None for one in measured(12, False).costs)
    kept = [one.kept_bytes_per_token for one in measured(12, True).costs]
    assert kept[0] == kept[-1]
    assert all(one is not None and one >= 4 * 32 for one in kept)  # the input, at least


def test_the_adapters_are_away_from_their_start_and_the_base_is_frozen():
    layers = prepare_layers(SIZES, CPU)
    assert trainable_parameters(layers[PLAIN]) == []
    assert all(bool(one.any()) for _, one in trainable_parameters(layers["v1"]))
    scales = [one for name, one in trainable_parameters(layers["v2"]) if "scale" in name]
    assert scales
    assert all(bool((one != 1).all()) for one in scales)


def test_kept_storages_count_once_and_parameters_not_at_all():
    module = nn.Linear(6, 5, bias=False)
    inputs = torch.randn(3, 6)

    def forward() -> torch.Tensor:
        output = module(inputs)  # keeps its input; the weight needs no gradient here but is kept below
        return output * output[:, :] * 2.0  # keeps one storage, twice

    assert kept_bytes(forward, module) == 4 * (3 * 6 + 3 * 5)
    assert kept_bytes(lambda: module(inputs.clone().requires_grad_()), module) == 4 * 3 * 6


@pytest.mark.parametrize("shape", [SIZES.shape, Shape(1, 48, 6, 6, 10, 80, 2)])
def test_a_layers_flops_are_those_that_pytorch_counts(shape: Shape):
    sizes = LayerSizes(shape, (16,), (), torch.float32, repeats=1, long_repeats=1)
    one = layer_module._contender("one", prepare_layers(sizes, CPU)[PLAIN], 16, CPU, is_training=True)
    assert one.backward is not None
    # Every kernel but this one is a single operation, which nothing is counted of on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = one.forward()
    linear, attention = counted(counter)
    assert shape.layer_flops(16, is_training=False) == linear + attention // 2  # the causal half
    with FlopCounterMode(display=False) as counter:
        one.backward(output)
    linear_back, attention_back = counted(counter)
    recomputed = attention // 2  # of q k and p v the first: this kernel keeps p, others do not
    both = linear + linear_back + (attention + attention_back + recomputed) // 2
    assert shape.layer_flops(16, is_training=True) == both


def counted(counter: FlopCounterMode) -> tuple[int, int]:
    """Return the operations of linear layers, and of attention, whose products have a batch."""
    found = counter.get_flop_counts()["Global"]
    attention = found[torch.ops.aten.bmm]
    return sum(found.values()) - attention, attention


def test_an_estimate_is_the_rounds_of_all_contenders_at_the_speed_of_a_short_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(
        layer_module, "time_in_turns", lambda *_, **__: {"probe": {"forward": Timing(10.0, 10.0, 10.0)}}
    )
    sizes = replace(SIZES, lengths=(12, 8192), training_lengths=())
    flops = [SIZES.shape.layer_flops(length, is_training=False) for length in sizes.lengths]
    short_s = (3 + 2) * 4 * 0.010
    long_s = (2 + 2) * 4 * 0.010 * flops[1] / flops[0]
    assert estimate_s(prepare_layers(sizes, CPU), sizes, CPU) == pytest.approx(short_s + long_s)


def test_long_rows_have_rounds_of_their_own_which_the_result_tells():
    assert [SIZES.rounds(length) for length in (4096, 4097)] == [3, 2]
    assert measured(12, True).rounds == 3


def test_the_7b_shape_is_llamas():
    shape = SHAPES["7b"]
    matrices = 4 * shape.width**2 + 3 * shape.width * shape.mlp_width
    norms = shape.width * (2 * shape.num_layers + 1)
    total = shape.num_layers * matrices + norms + 2 * shape.vocabulary * shape.width
    assert total == 6_738_415_616
    assert shape.num_heads * shape.head_dim == shape.width


def test_the_command_prints_a_table_and_saves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = ["layer", *TINY, "--lengths", "24", "--training_lengths", "12"]
    cli.main(cli.benchmark, cli.benchmark_parser("doc"), [*asked, "--output_dir", str(tmp_path)])
    saved = json.loads((tmp_path / "layer_cpu.json").read_text(encoding="utf-8"))
    assert saved["provenance"]["hardware"]
    assert saved["sizes"]["shape"]["num_kv_heads"] == 2
    found = [(group["num_tokens"], group["is_training"]) for group in saved["groups"]]
    assert found == [(12, True), (24, False)]
    shown = capsys.readouterr().out
    text = (tmp_path / "layer_cpu.md").read_text(encoding="utf-8")
    for group, last in zip(saved["groups"], ("both", "forward"), strict=True):
        for one in group["costs"]:
            assert re.search(rf"{one['name']} +.* {one['ratio'][last]:.3f} ", shown)
            assert f"| {one['ratio'][last]:.3f} |" in text
    assert "this takes about " in shown
    assert "## 12 tokens, training, 2 rounds" in text
    assert f"{saved['groups'][0]['costs'][0]['kept_bytes_per_token'] / 1024:.1f} KiB" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "0"], "--width: must be 1 or more, got 0"),
        (["--width", "100"], "--width: 100 is no multiple of 32 heads; change one or give --head_dim"),
        (["--head_dim", "7"], "--head_dim: must be even, positions rotate pairs, got 7"),
        (["--kv_heads", "3"], "--kv_heads: must divide the 32 query heads, got 3"),
        (["--training_lengths", "2k"], "--training_lengths: must be whole numbers above 0, .* got '2k'"),
        (["--modes", "fixed"], "--modes: belongs to attention; layer does not take it"),
        (["--backends", "flex"], "--backends: belongs to attention; layer does not take it"),
        (["--shape", "mid"], "--shape: belongs to step and memory; layer does not take it"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        cli.main(
            cli.benchmark, cli.benchmark_parser("doc"), ["layer", *arguments, "--output_dir", str(tmp_path)]
        )
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: {message}", said), said
