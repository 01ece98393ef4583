"""The arithmetic of efficiency, on times that are made up."""

import pytest

from sparse_llama.benchmark.efficiency import mean_utilisation, split_efficiency


def test_efficiency_is_speed_up_times_density_and_its_factors_say_where_it_went():
    """Dense 100 ms, 10 times sparser in 20 ms: half of what density promises. The code needs 125 ms for what
    the dense kernel does in 100 (0.8) and computes 4 pairs for 3 (0.75); the rest is 0.5 / 0.8 / 0.75."""
    found = split_efficiency(dense_ms=100, sparse_ms=20, causal_ms=125, density=0.1, utilisation=0.75)
    assert found.total == pytest.approx(0.5)
    assert found.kernel == pytest.approx(0.8)
    assert found.tile == 0.75
    assert found.schedule == pytest.approx(0.5 / 0.8 / 0.75)


@pytest.mark.parametrize("sparse_ms", [1.0, 7.5, 400.0])
def test_the_factors_multiply_to_the_whole(sparse_ms: float):
    found = split_efficiency(dense_ms=90, sparse_ms=sparse_ms, causal_ms=60, density=0.3, utilisation=0.4)
    assert found.kernel * found.tile * found.schedule == pytest.approx(found.total)


def test_an_ideal_kernel_has_efficiency_1_at_any_density():
    for density in (0.01, 0.25, 1.0):
        found = split_efficiency(
            dense_ms=80, sparse_ms=80 * density, causal_ms=80, density=density, utilisation=1.0
        )
        assert (found.total, found.kernel, found.tile) == pytest.approx((1, 1, 1))
        assert found.schedule == pytest.approx(1)


def test_utilisation_of_several_kernels_is_useful_over_computed_products():
    """3 useful products of 3 computed, and 4 of 16: 7 of 19."""
    assert mean_utilisation([(3, 1.0), (4, 0.25)]) == pytest.approx(7 / 19)
