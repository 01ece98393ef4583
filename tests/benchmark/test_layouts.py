"""The layouts that are measured, and the cost of building them."""

import pytest
import torch
from oracles.masked_attention import token_table

from sparse_llama.benchmark.build import measure_build, tensor_bytes
from sparse_llama.benchmark.layouts import LAYOUT_NAMES, describe_layout, layout_options
from sparse_llama.config.sparsity import MODES, parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import build_layout


def test_every_mode_is_measured_that_needs_no_file():
    modes = {layout_options(name, block=16, num_tokens=4096)["mode"] for name in LAYOUT_NAMES}
    assert modes == set(MODES) - {"dense", "mask"}


@pytest.mark.parametrize("block", [16, 24, 64, 128])
@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_every_layout_is_a_sparse_attention_block_at_any_size(name: str, block: int):
    for num_tokens in (8 * block, 4096, 100_000):
        options = layout_options(name, block=block, num_tokens=num_tokens)
        assert options["block"] == block
        assert parse_sparsity(options).block == block
    assert describe_layout(name)


@pytest.mark.parametrize("num_tokens", [4096, 8192, 16384])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_density_is_that_of_layouts_in_use(name: str, block: int, num_tokens: int):
    options = layout_options(name, block=block, num_tokens=num_tokens)
    layout = build_layout(options, num_heads=2, num_blocks=num_tokens // block)
    assert 0.08 <= layout.density_at(num_tokens) <= 0.35


def test_a_sequence_of_few_blocks_is_refused():
    with pytest.raises(ConfigError, match="--blocks: 128 is too large for --lengths 1000; use at most 125"):
        layout_options("fixed", block=128, num_tokens=1000)


def test_bytes_are_those_of_tensors_each_counted_once():
    class Holder:
        def __init__(self, inner: object) -> None:
            self.inner, self.name = inner, "x"

    table = torch.zeros(10, dtype=torch.int64)
    assert tensor_bytes(Holder((table, Holder([table[2:], torch.zeros(3)])))) == 80 + 12
    assert tensor_bytes(Holder({"derived": table})) == 0


def test_the_cost_of_a_layout_is_time_and_bytes_beside_those_of_a_dense_tensor():
    built = measure_build("fixed", num_tokens=2048, block=16, num_heads=4, repeats=2)
    layout = build_layout(built.options, num_heads=4, num_blocks=128)
    triangle = 4 * 2048 * 2049 / 2
    assert built.density == pytest.approx(int(token_table(layout, 4, 2048).sum()) / triangle)
    assert built.num_bytes_dense == torch.zeros(4, 128, 128, dtype=torch.int64).nbytes
    assert sum(pattern.nbytes for pattern in layout.patterns) <= built.num_bytes < built.num_bytes_dense / 4
    assert 0 < built.time.lower_ms <= built.time.median_ms <= built.time.upper_ms
