"""What stage 3 has whole at once: the rule against DeepSpeed itself, in a process of its own."""

from typing import Any

import pytest
from planned_runs import SMALL, document, llama, run_of
from profiled_steps import look_at_cells

from sparse_llama.planning.planned_step import make_batch, plan_step
from sparse_llama.planning.zero import zero_memory

SHAPE = SMALL | {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 10, "vocab_size": 2000}
NO_REUSE = {"stage3_max_reuse_distance": 0}
CASES: dict[str, dict[str, Any]] = {
    "nothing kept": NO_REUSE | {"stage3_prefetch_bucket_size": 0},
    "kept for reuse": {"stage3_max_reuse_distance": 2_000_000, "stage3_prefetch_bucket_size": 0},
    "fetched ahead": NO_REUSE | {"stage3_prefetch_bucket_size": 100_000},
    "fetched ahead, limited": NO_REUSE
    | {"stage3_prefetch_bucket_size": 100_000, "stage3_max_live_parameters": 400_000},
}


@pytest.mark.slow
def test_the_live_parameters_are_no_more_than_planned(tmp_path):
    """Every module fetches ahead: at its defaults stage 3 has a billion parameters whole, 2 GB at 7B."""
    cells: list[dict[str, Any]] = []
    for zero in CASES.values():
        block = {"stage": 3, "stage3_param_persistence_threshold": 2000}
        made = document(128, checkpointing={}, zero_optimization=block | zero)
        config = SHAPE | {"model_type": "llama", "max_position_embeddings": 256}
        cells.append({"config": config, "document": made})
    found = look_at_cells("live_parameters.py", cells, tmp_path, key="live")
    for case, cell, looked in zip(CASES, cells, found, strict=True):
        run = run_of(tmp_path, cell["document"])
        step = plan_step(run, llama(SHAPE), "cuda", make_batch(1, 128, None, None))
        memory = zero_memory(run, step.parameters, device="cuda", ranks=2)
        gathered = memory.weights + memory.loss
        planned = sum(one for kind, one in gathered.items() if kind.name.startswith("gathered")) // 2
        live = looked["live"]
        assert live <= planned <= 1.5 * live, (case, live, planned)
