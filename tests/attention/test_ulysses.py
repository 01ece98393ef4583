"""Rows that ranks share attend as one rank's do: real processes over gloo, every layout, packed documents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_ranks

from sparse_llama.attention.ulysses import UlyssesCore, check_heads, own_heads
from sparse_llama.distributed.sequence import SequenceParallel
from sparse_llama.errors import ConfigError

SCRIPT = Path(__file__).with_name("ulysses_ranks.py")
GROUPS = ["2 of 4", "4 of 4"]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Any]]:
    """Return what every rank found in groups of two and of four; one start for all tests."""
    found = run_ranks(SCRIPT, 4, "[2, 4]")
    return {name: [rank[number] for rank in found] for number, name in enumerate(GROUPS)}


def cells(outcomes: dict[str, list[Any]], group: str) -> dict[str, dict[str, Any]]:
    return {
        f"{name}, rank {rank}": cell
        for rank, outcome in enumerate(outcomes[group])
        for name, cell in outcome["cells"].items()
    }


@pytest.mark.parametrize("group", GROUPS)
def test_the_output_is_one_ranks_to_the_bit(outcomes: dict[str, list[Any]], group: str):
    """Each head's kernel call is the one that a single rank makes: the same queries, keys and blocks."""
    found = cells(outcomes, group)
    assert len(found) == 10 * 4
    assert [name for name, cell in found.items() if not cell["output_is_equal"]] == []


@pytest.mark.parametrize("group", GROUPS)
def test_every_gradient_is_one_ranks(outcomes: dict[str, list[Any]], group: str):
    """A key/value head that several ranks have is summed over these in another order."""
    tolerance = {"fp32": 1e-6, "bf16": 0.0}
    for name, cell in cells(outcomes, group).items():
        assert cell["from_one_rank"] <= tolerance.get(name.split(",")[0], 1e-13), name


@pytest.mark.parametrize("group", GROUPS)
def test_output_and_gradients_are_the_definition(outcomes: dict[str, list[Any]], group: str):
    """Dense softmax under the layout's table in fp64: an error that one rank makes too would show here."""
    tolerance = {"fp32": 1e-6, "bf16": 1e-2}
    for name, cell in cells(outcomes, group).items():
        assert cell["from_definition"] <= tolerance.get(name.split(",")[0], 1e-13), name
        assert name.startswith("full") or cell["density"] < 0.6, "a nearly full layout would prove nothing"


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_model_with_prompts_has_one_ranks_loss_and_gradients(
    outcomes: dict[str, list[Any]], group: str, version: str
):
    """The prompt's attention stays with a rank's own tokens, so its gradients are sums over the ranks."""
    for outcome in outcomes[group]:
        model = outcome["models"][version]
        assert model["least_gradient"] > 1e-3
        assert model["loss"] < 1e-12
        assert model["gradient"] < 5e-7  # transformers' norms compute in fp32, also in an fp64 model


@pytest.mark.parametrize("group", GROUPS)
def test_16_bit_tensors_are_exchanged(outcomes: dict[str, list[Any]], group: str):
    assert all(outcome["exchanges_16_bits"] for outcome in outcomes[group])


def test_a_plans_core_allocates_what_a_ranks_does_and_sends_nothing():
    """Four tokens of six heads on each of three ranks: inside, twelve tokens of two heads."""
    seen: list[list[tuple[int, ...]]] = []

    class Inner:
        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append([tuple(tensor.shape) for tensor in inputs])
            return torch.empty_like(inputs[0]), inputs[0][..., 0]

        def backward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen.append([tuple(tensor.shape) for tensor in inputs])
            return inputs[1:4]

    core = UlyssesCore(Inner(), SequenceParallel(size=3, rank=0))  # type: ignore[arg-type]
    query, key, value = (torch.empty(2, heads, 4, 5, device="meta") for heads in (6, 1, 1))
    output, lse = core.forward(query, key, value)
    assert (output.shape, lse.shape) == ((2, 6, 4, 5), (2, 6, 4))
    gradients = core.backward(output, query, key, value, output, lse, lse)
    assert [one.shape for one in gradients] == [query.shape, key.shape, value.shape]
    wide, narrow, statistic = (2, 2, 12, 5), (2, 1, 12, 5), (2, 2, 12)
    assert seen == [[wide, narrow, narrow], [wide, wide, narrow, narrow, wide, statistic, statistic]]
    with pytest.raises(AssertionError, match="only a plan"):
        core.forward(*(torch.zeros(2, 6, 4, 5) for _ in range(3)))


def test_a_rank_keeps_the_heads_numbers_in_the_layer():
    """By which a layout of its own per head, and a group of heads, know their patterns."""
    sequence = SequenceParallel(size=4, rank=2)
    assert own_heads(range(32), sequence) == range(16, 24)
    assert own_heads(range(8, 16), sequence) == range(12, 14)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(32, 32, 8), (32, 8, 4), (32, 8, 32), (32, 1, 16), (6, 2, 6), (1, 1, 1), (12, 4, 2)],
)
def test_ranks_that_divide_the_heads_are_taken(heads: int, kv_heads: int, size: int):
    check_heads(heads, kv_heads, size)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "allowed"),
    [
        (32, 32, 3, "1, 2, 4, 8, 16 or 32"),
        (12, 4, 3, "1, 2, 4 or 12"),
        (32, 8, 64, "1, 2, 4, 8, 16 or 32"),
        (1, 1, 2, "1"),
    ],
)
def test_other_numbers_of_ranks_are_refused_with_those_that_fit(
    heads: int, kv_heads: int, size: int, allowed: str
):
    with pytest.raises(ConfigError) as refused:
        check_heads(heads, kv_heads, size)
    assert str(refused.value) == (
        f"sequence_parallel_size: {size} ranks cannot share query heads and key/value heads evenly, {heads} "
        f"and {kv_heads}; use {allowed}"
    )


def test_ranks_share_the_heads_of_a_group():
    """32 heads in 8 groups are 4 at a time, of one key/value head each: four ranks at most."""
    check_heads(32, 8, 4, num_groups=8)
    with pytest.raises(ConfigError) as refused:
        check_heads(32, 8, 8, num_groups=8)
    assert str(refused.value) == (
        "sequence_parallel_size: 8 ranks cannot share query heads and key/value heads of each of 8 "
        "sparse_llama.memory.head_groups evenly, 4 and 1; use 1, 2 or 4"
    )
