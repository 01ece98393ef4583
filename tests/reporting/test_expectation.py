"""What sparse attention is worth, against the roofline worked out by hand."""

import pytest

from sparse_llama.reporting.expectation import CPU_EFFICIENCY, Work, expected_rows


def work(num_tokens: int, *densities: float) -> Work:
    """Return the work of one document, in layers of these densities, equally many of each."""
    layers = tuple((1 / len(densities), density) for density in densities)
    return Work(num_tokens, num_tokens * (num_tokens + 1) // 2, layers)


def verdict(num_tokens: int, *densities: float) -> str:
    return dict(expected_rows(work(num_tokens, *densities)))["worth it"]


def test_a_step_of_16384_tokens_is_the_roofline_of_llama_7b():
    """217 TFLOP of linear layers and 70.4 of dense attention in a forward pass; 0.152 of its pairs attend."""
    linear_s = 3 * 217 / 230
    dense_s = 70.4 * (2 / 195 + 2.5 / 170)
    sparse_s = 0.152 * 70.4 * (2 / 160 + 2.5 / 120)
    found = work(16384, 0.152)
    assert found.step_speed_up() == pytest.approx((linear_s + dense_s) / (linear_s + sparse_s), rel=0.005)
    assert found.step_limit() == pytest.approx(1 + dense_s / linear_s, rel=0.005)
    attention = (1 / 195 + 2.5 / 170) / (0.152 * (1 / 160 + 2.5 / 120))
    assert found.gpu_speed_up() == pytest.approx(attention, rel=0.005)


def test_attention_on_the_cpu_is_efficiency_by_density_times_as_fast():
    assert work(4096, 0.25).cpu_speed_ups() == pytest.approx([4 * share for share in CPU_EFFICIENCY])


def test_dense_layers_take_the_time_of_dense_attention():
    mixed = work(65536, 0.05, 1.0)
    low, _ = mixed.cpu_speed_ups()
    assert low == pytest.approx(1 / (0.5 + 0.5 * 0.05 / CPU_EFFICIENCY[0]))
    assert mixed.gpu_speed_up() < 2
    assert 1 < mixed.step_speed_up() < work(65536, 0.05).step_speed_up()


def test_packed_documents_leave_less_to_gain():
    """Eight documents have an eighth of the pairs of a row, and as many tokens."""
    packed = Work(16384, 8 * 2048 * 2049 // 2, ((1.0, 0.152),))
    assert packed.step_limit() - 1 == pytest.approx((work(16384, 0.152).step_limit() - 1) / 8, rel=0.001)


def test_the_verdict_follows_length_and_density():
    assert verdict(4096, 0.516).startswith("hardly")
    assert verdict(8192, 0.274).startswith("a little")
    assert verdict(32768, 0.092).startswith("yes")
    for num_tokens, density in ((4096, 0.516), (8192, 0.274)):
        assert "below about 8,192 tokens there is little to gain" in verdict(num_tokens, density)
    assert verdict(65536, 0.95) == "hardly: 95% of the token pairs attend; a sparser layout gains more"


def test_a_layout_that_is_causal_gains_nothing():
    (row,) = expected_rows(work(65536, 1.0))
    assert row[0] == "none"


def test_every_figure_says_whether_it_was_measured():
    rows = dict(expected_rows(work(16384, 0.152)))
    assert "measured" in rows["attention, CPU"]
    for label in ("attention, A100", "LLaMA-7B step, A100"):
        assert "a model, not measured" in rows[label]
