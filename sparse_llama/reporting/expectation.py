"""What a sparse layout is worth in time, before it is run: said as measured, or as the model that it is.

Attention alone is ``efficiency / density`` times as fast as dense flash attention. The efficiency of the CPU
kernels is measured. For a GPU this is a roofline model: floating-point operations over the rates that
kernels are taken to achieve. It knows no communication, no optimizer and no data loading.
"""

from dataclasses import dataclass

from sparse_llama.reporting.rates import A100

CPU_EFFICIENCY = (0.64, 0.86)
"""Of the CPU kernels at blocks of 64 and from 4,096 tokens up, forward + backward, fp32: the least and the
most of any mode in docs/results/attention_cpu.md and docs/results/modes/attention_cpu.md."""

# LLaMA-7B: 32 layers, 32 heads of 128, an MLP of 11,008, 32,000 tokens of vocabulary.
_LINEAR_FLOP = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000)  # a token, forward: 13.2 GFLOP
_PAIR_FLOP = 32 * 4 * 4096  # a (query, key) pair in all heads and layers, forward; backward is 2.5 times that
_LITTLE, _SOME = 1.05, 1.25  # speed-ups of a step
_SHORT = 1.35  # step_limit of a row a little longer than 8,192 tokens


@dataclass(frozen=True)
class Work:
    """Attention over one row of tokens, in a whole model."""

    num_tokens: int
    causal_pairs: int
    """Token pairs of dense attention: T (T + 1) / 2, or of packed documents the sum of theirs."""
    layers: tuple[tuple[float, float], ...]
    """Share of the layers, and the share of ``causal_pairs`` that attend in them, averaged over heads."""

    @property
    def density(self) -> float:
        return sum(share * density for share, density in self.layers)

    def cpu_speed_ups(self) -> tuple[float, float]:
        """Return how many times as fast as dense attention this is on a CPU, at least and at best."""
        low, high = (1 / self._attention(1.0, 1 / efficiency) for efficiency in CPU_EFFICIENCY)
        return low, high

    def gpu_speed_up(self) -> float:
        """Return the same for an A100, forward + backward."""
        dense, sparse = (1 / forward + 2.5 / backward for forward, backward in (A100.dense, A100.sparse))
        return dense / self._attention(dense, sparse)

    def step_speed_up(self) -> float:
        """Return how many times as fast a training step of LLaMA-7B is on an A100: frozen base, all layers
        checkpointed."""
        linear, dense, sparse = self._step_s()
        return (linear + dense) / (linear + self._attention(dense, sparse))

    def step_limit(self) -> float:
        """Return the same if attention took no time at all."""
        linear, dense, _ = self._step_s()
        return (linear + dense) / linear

    def _attention(self, dense: float, sparse: float) -> float:
        """Return the time of attention, given those of all pairs by dense and by block-sparse kernels."""
        return sum(share * (dense if density == 1 else density * sparse) for share, density in self.layers)

    def _step_s(self) -> tuple[float, float, float]:
        """Return the seconds of linear layers, of dense attention, and of sparse attention to all pairs: a
        forward pass, another to recompute it, and a backward pass without gradients of weights."""
        linear = 3 * self.num_tokens * _LINEAR_FLOP / A100.linear
        dense, sparse = (
            self.causal_pairs * _PAIR_FLOP * (2 / forward + 2.5 / backward)
            for forward, backward in (A100.dense, A100.sparse)
        )
        return linear, dense, sparse


def expected_rows(work: Work) -> list[tuple[str, str]]:
    """Return what to expect as rows of label and value; where there is nothing to gain, that and why."""
    if all(density == 1 for _, density in work.layers):
        return [("none", "every token sees all tokens before it: dense attention, by PyTorch's own kernels")]
    step, limit = work.step_speed_up(), work.step_limit()
    low, high = work.cpu_speed_ups()
    return [
        (
            "attention, CPU",
            f"{low:.1f}x to {high:.1f}x: {CPU_EFFICIENCY[0]:.2f} to {CPU_EFFICIENCY[1]:.2f} of "
            "1 / density, measured at blocks of 64, fp32",
        ),
        (
            "attention, A100",
            f"{work.gpu_speed_up():.1f}x: a model, not measured; bf16, blocks of 64 and more",
        ),
        (
            "LLaMA-7B step, A100",
            f"{step:.2f}x: a model, not measured; frozen base, checkpointed layers; {limit:.2f}x if "
            "attention took no time",
        ),
        ("worth it", _verdict(work)),
    ]


def _verdict(work: Work) -> str:
    step, limit = work.step_speed_up(), work.step_limit()
    if step >= _SOME:
        return f"yes: dense attention takes {100 * (1 - 1 / limit):.0f}% of such a step"
    answer = "a little" if step >= _LITTLE else "hardly"
    if limit < _SHORT:
        return (
            f"{answer}: dense attention takes {100 * (1 - 1 / limit):.0f}% of such a step; below about 8,192 "
            "tokens there is little to gain, from there on more with every doubling"
        )
    return f"{answer}: {100 * work.density:.0f}% of the token pairs attend; a sparser layout gains more"
