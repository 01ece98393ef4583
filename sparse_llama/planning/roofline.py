"""How long an optimizer step takes, by a roofline: a model, not a measurement.

Floating-point operations over the rates that kernels are taken to achieve (``reporting/rates.py``),
element-wise operations over the rate of the GPU's memory, and beside them what crosses the bus and goes to
the drive, taken to be hidden behind the rest: the longest of the three is the step. It knows no communication
between GPUs, no optimizer (megabytes) and no data loading.
"""

from dataclasses import dataclass

from transformers import LlamaConfig

from sparse_llama.attention.documents import whole_rows
from sparse_llama.attention.interface import AttentionPlan
from sparse_llama.config.run import Run
from sparse_llama.model.assemble import plan_of_run
from sparse_llama.planning.estimate import Estimate
from sparse_llama.planning.planned_step import BACKWARD_PASSES, forward_passes
from sparse_llama.planning.prepared_attention import attention_flops
from sparse_llama.planning.shapes import head_widths, linear_outputs
from sparse_llama.reporting.rates import Rates


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on each rank."""

    linear_s: float
    """Matrix products but those of attention."""
    attention_s: float
    elementwise_s: float
    to_host_s: float
    from_host_s: float
    disk_s: float
    num_tokens: int
    """Of the step, of all ranks."""

    @property
    def compute_s(self) -> float:
        return self.linear_s + self.attention_s + self.elementwise_s

    @property
    def total_s(self) -> float:
        return max(self.compute_s, self.to_host_s, self.from_host_s, self.disk_s)

    @property
    def binds(self) -> str:
        """What the step waits for."""
        if self.total_s == self.compute_s:
            return "the GPU computes"
        return "the drive" if self.total_s == self.disk_s else "the bus to host memory"


def step_time(run: Run, config: LlamaConfig, made: Estimate, rates: Rates) -> StepTime:
    """Return the time of a step of ``run``, whose estimate is ``made``."""
    attention_flops, attention_s = _attention(run, config, rates)
    traffic = made.traffic_bytes
    return StepTime(
        linear_s=max(made.flops - attention_flops, 0.0) / rates.linear,
        attention_s=attention_s,
        elementwise_s=_elementwise_bytes(run, config) / rates.memory,
        to_host_s=traffic.gpu_to_host / rates.bus,
        from_host_s=traffic.host_to_gpu / rates.bus,
        disk_s=(traffic.host_to_disk + traffic.disk_to_host) / rates.disk,
        num_tokens=run.global_batch_size * run.settings.seq_length,
    )


def plan_of(run: Run, config: LlamaConfig) -> AttentionPlan:
    """Return which layer attends by which layout, at the run's length."""
    return plan_of_run(run.settings, run.layouts, config)


def _attention(run: Run, config: LlamaConfig, rates: Rates) -> tuple[float, float]:
    """Return the operations of attention in a step of one rank, and their seconds; every row is one
    document."""
    plan, num_layers = plan_of(run, config), config.num_hidden_layers
    trained = run.settings.adapter.adapted_layers(num_layers)
    first = trained.start if len(trained) > 0 else num_layers
    rows = run.micro_batch_size * run.gradient_accumulation_steps
    each = attention_flops(plan, whole_rows(rows, run.settings.seq_length), config)
    repeated = forward_passes(run, num_layers - first)
    flops = seconds = 0.0
    for layer, (master, one_pass) in enumerate(zip(plan.layers, each, strict=True)):
        forward, backward = rates.dense if master is None else rates.sparse
        passes, products = (repeated, BACKWARD_PASSES) if layer >= first else (1.0, 0.0)
        flops += one_pass * (passes + products)
        seconds += one_pass * (passes / forward + products / backward)
    return flops / run.sequence_parallel_size, seconds / run.sequence_parallel_size


def _elementwise_bytes(run: Run, config: LlamaConfig) -> float:
    """Return what the element-wise operations of a step read and write.

    Of an eager LLaMA layer in 16 bits, forward, bytes a token: two norms (36 each per width: to fp32, square,
    mean, times, back, weight), two residual sums (6 each), RoPE (24 per width of queries and keys), SiLU and
    the product after it (10 per MLP width); v2's scale and bias 4 each per output. A backward pass counts as
    two.
    """
    outputs, adapter = linear_outputs(config), run.settings.adapter
    per_token = 84 * config.hidden_size + 24 * sum(head_widths(config)) + 10 * config.intermediate_size
    for names in (adapter.scaled, adapter.biased):
        per_token += 4 * sum(outputs[name] for name in names if name in outputs)
    scale = 2 if run.precision == "fp32" else 1
    rows = run.micro_batch_size * run.gradient_accumulation_steps / run.sequence_parallel_size
    trained = len(run.settings.adapter.adapted_layers(config.num_hidden_layers))
    passes = (config.num_hidden_layers - trained) + trained * (forward_passes(run, trained) + 2)
    return scale * per_token * rows * run.settings.seq_length * passes
