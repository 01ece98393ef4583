"""What is compared computes attention, and counts what it computes."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from oracles.masked_attention import attend, relative_error, token_table
from torch.nn.attention import SDPBackend

from sparse_llama.attention import blockwise, tiles
from sparse_llama.attention.tiles import Tile, Tiles
from sparse_llama.benchmark import contenders
from sparse_llama.benchmark.attention import Sizes, measure_group
from sparse_llama.benchmark.check import worst_error
from sparse_llama.benchmark.contenders import (
    Backend,
    Inputs,
    contender,
    dense_kernels,
    draw_inputs,
    prepare_backend,
    useful_pairs,
    why_not,
)
from sparse_llama.benchmark.layouts import Options
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout, build_layout

CPU = torch.device("cpu")
NUM_TOKENS = 320
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
BACKENDS = ["blockwise", pytest.param("flex", marks=NEEDS_COMPILER)]
PER_HEAD = {
    "mode": "fixed",
    "block": 16,
    "num_local_blocks": 4,
    "different_layout_per_head": True,
    "num_different_global_patterns": 2,
}
WINDOW = {"mode": "local_sliding_window", "block": 16, "num_sliding_window_blocks": 5}
FULL = {"mode": "dense", "block": 16}


def inputs_of(num_kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> Inputs:
    return draw_inputs(
        num_heads=4, num_kv_heads=num_kv_heads, num_tokens=NUM_TOKENS, head_dim=16, dtype=dtype, device=CPU
    )


def layout_of(options: Options) -> Layout:
    return build_layout(options, num_heads=4, num_blocks=NUM_TOKENS // 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [PER_HEAD, WINDOW, FULL], ids=["per head", "window", "full"])
def test_a_backend_computes_the_layout(backend: Backend, options: Options):
    inputs, layout = inputs_of(), layout_of(options)
    prepared = prepare_backend(backend, layout, inputs)
    found = prepared.attend(*inputs.leaves(has_backward=prepared.has_backward))
    table = token_table(layout, 4, NUM_TOKENS)
    wanted = attend(inputs.query.double(), inputs.key.double(), inputs.value.double(), table, inputs.scaling)
    assert relative_error(found, wanted) < 1e-6


def test_the_dense_kernel_of_a_cpu_is_flash_and_causal_and_takes_shared_heads():
    inputs = inputs_of()
    kernels = dense_kernels(inputs)
    assert list(kernels) == ["flash"]
    q, k, v = inputs.leaves(has_backward=False)
    wanted = F.scaled_dot_product_attention(
        q.double(), k.repeat_interleave(2, 1).double(), v.repeat_interleave(2, 1).double(), is_causal=True
    )
    assert relative_error(kernels["flash"](q, k, v), wanted) < 1e-6


def test_heads_that_no_dense_kernel_takes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contenders, "DENSE_KERNELS", {"cudnn": SDPBackend.CUDNN_ATTENTION})  # CUDA's
    sizes = Sizes(("fixed",), (256,), (16,), ("blockwise",), 4, 2, 16, torch.float32, repeats=1)
    with pytest.raises(ConfigError, match="--head_dim 16, --dtype float32: no fused kernel"):
        measure_group(sizes, num_tokens=256, block=16, device=CPU)


def test_the_full_causal_layout_is_not_left_to_pytorchs_kernel(monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object) -> None:
        raise AssertionError("one causal call")

    monkeypatch.setattr(blockwise, "causal_forward", refuse)
    inputs = inputs_of()
    prepare_backend("blockwise", layout_of(FULL), inputs).attend(*inputs.leaves(has_backward=True))


@pytest.mark.parametrize("options", [PER_HEAD, WINDOW, FULL], ids=["per head", "window", "full"])
def test_utilisation_is_what_the_kernel_is_given(monkeypatch: pytest.MonkeyPatch, options: Options):
    computed = 0
    kernel = blockwise.masked_forward

    def count(query: torch.Tensor, key: torch.Tensor, *rest: object, **options: object):
        nonlocal computed
        computed += query.shape[1] * query.shape[2] * key.shape[2]
        return kernel(query, key, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(blockwise, "masked_forward", count)
    inputs, layout = inputs_of(), layout_of(options)
    prepared = prepare_backend("blockwise", layout, inputs)
    prepared.attend(*inputs.leaves(has_backward=True))
    useful = int(token_table(layout, 4, NUM_TOKENS).sum())
    assert prepared.utilisation["forward"] == pytest.approx(useful / computed)
    assert prepared.utilisation["both"] == prepared.utilisation["forward"]
    assert prepared.utilisation["forward"] <= 1


@NEEDS_COMPILER
def test_utilisation_of_flex_counts_its_tiles():
    """320 tokens are 3 tiles of 128 on a side, 6 of them on or below the diagonal."""
    prepared = prepare_backend("flex", layout_of(FULL), inputs_of())
    assert prepared.utilisation["forward"] == pytest.approx(320 * 321 / 2 / (6 * 128 * 128))


@pytest.mark.parametrize("options", [PER_HEAD, WINDOW, FULL], ids=["per head", "window", "full"])
def test_utilisation_of_triton_counts_the_tiles_that_hold_a_pair(
    monkeypatch: pytest.MonkeyPatch, options: Options
):
    """In blocks of 128 every tile lies in one block: those to compute are those that are not empty."""
    inputs = draw_inputs(
        num_heads=4, num_kv_heads=2, num_tokens=1280, head_dim=16, dtype=torch.float32, device=CPU
    )
    layout = build_layout(options | {"block": 128}, num_heads=4, num_blocks=10)
    # three shapes, so that no kernel's utilisation is another's
    chosen = Tiles(Tile(64, 32, 4, 2), Tile(16, 32, 4, 2), Tile(64, 128, 4, 2))
    monkeypatch.setattr(tiles, "choose_tiles", lambda *sizes: chosen)
    prepared = prepare_backend("triton", layout, inputs)
    pairs = token_table(layout, 4, 1280)
    shares: list[float] = []
    for tile in chosen:
        cells = pairs.view(4, 1280 // tile.queries, tile.queries, 1280 // tile.keys, tile.keys)
        num_computed = int(cells.any(4).any(2).sum()) * tile.queries * tile.keys
        shares.append(int(pairs.sum()) / num_computed)
    forward, grad_query, grad_key = shares
    assert prepared.utilisation == pytest.approx(
        {
            "forward": forward,
            "backward": 7 / (3 / grad_query + 4 / grad_key),
            "both": 9 / (2 / forward + 3 / grad_query + 4 / grad_key),
        }
    )


@pytest.mark.parametrize("options", [PER_HEAD, WINDOW, FULL], ids=["per head", "window", "full"])
def test_useful_pairs_are_the_tables(options: Options):
    layout = layout_of(options)
    assert useful_pairs(layout, NUM_TOKENS) == int(token_table(layout, 4, NUM_TOKENS).sum())


@pytest.mark.slow
@NEEDS_COMPILER
def test_more_masks_than_dynamo_compiles_by_default_are_compiled():
    """After 8 it would raise; without ``fullgraph`` it would compute in T x T memory."""
    inputs = inputs_of()
    for block in range(16, 16 + 10 * 8, 8):
        options = WINDOW | {"block": block, "num_sliding_window_blocks": 3}
        layout = build_layout(options, num_heads=4, num_blocks=NUM_TOKENS // block + 1)
        prepare_backend("flex", layout, inputs)


def test_inputs_are_normal_numbers_the_same_every_time():
    first, again = inputs_of(), inputs_of()
    for one, two in zip(vars(first).values(), vars(again).values(), strict=True):
        assert torch.equal(one, two)
        assert abs(float(one.detach().mean())) < 0.05
        assert float(one.detach().std()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(first.key, first.value)


@pytest.mark.parametrize(
    ("backend", "device", "reason"),
    [
        ("blockwise", "cuda", "made for the CPU"),
        ("triton", "cpu", "needs a CUDA device"),
        ("blockwise", "cpu", None),
        ("triton", "cuda", None),
        ("flex", "cuda", None),
    ],
)
def test_a_backend_says_why_it_cannot_run(backend: Backend, device: str, reason: str | None):
    found = why_not(backend, torch.device(device))
    assert found is None if reason is None else reason in str(found)


def test_flex_on_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler" in str(why_not("flex", CPU))
    monkeypatch.setenv("CXX", "python")  # anything that can be run
    assert why_not("flex", CPU) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [PER_HEAD, WINDOW, FULL], ids=["per head", "window", "full"])
def test_the_check_passes_what_is_right(dtype: torch.dtype, options: Options):
    inputs, layout = inputs_of(dtype=dtype), layout_of(options)
    prepared = prepare_backend("blockwise", layout, inputs)
    worst_error(contender("right", prepared.attend, inputs, has_backward=True), layout, inputs)


def test_the_check_refuses_another_layout():
    inputs = inputs_of()
    prepared = prepare_backend("blockwise", layout_of(WINDOW | {"num_sliding_window_blocks": 7}), inputs)
    wrong = contender("wrong", prepared.attend, inputs, has_backward=True)
    with pytest.raises(AssertionError, match="wrong: a relative error of"):
        worst_error(wrong, layout_of(WINDOW), inputs)


def test_the_check_refuses_a_wrong_gradient():
    inputs, layout = inputs_of(), layout_of(WINDOW)
    prepared = prepare_backend("blockwise", layout, inputs)

    def halved(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        right = prepared.attend(query, key, value)
        return right.detach() + 0.5 * (right - right.detach())

    with pytest.raises(AssertionError, match=r"half: a relative error of 5\.0e-01"):
        worst_error(contender("half", halved, inputs, has_backward=True), layout, inputs)
