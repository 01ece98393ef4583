"""What the ranks of a run must have in common: asked before they load anything, and again before step 1."""

from typing import Any

from sparse_llama.config.run import Run
from sparse_llama.distributed.agreement import fingerprint
from sparse_llama.training.checkpoint import shapes_of
from sparse_llama.training.metrics import versions
from sparse_llama.training.resuming import Start
from sparse_llama.training.session import Session


def agreed_configuration(run: Run) -> dict[str, Any]:
    """Return what is known before data and model are read; paths may differ between hosts."""
    document = run.to_json()
    for name in ("config_path", "output_dir"):
        del document[name]
    return {"configuration": document, "packages": versions()}


def agreed_session(session: Session, start: Start | None) -> dict[str, Any]:
    """Return what a run is about to compute with."""
    length, plan = session.run.settings.seq_length, session.plan
    layouts = [plan.layout(layer, length) for layer in range(len(plan.layers))]
    distinct = {id(layout): layout for layout in layouts if layout is not None}
    patterns = {
        f"{number} {pattern} {tensor}": part
        for number, layout in enumerate(distinct.values())
        for pattern, intervals in enumerate(layout.patterns)
        for tensor, part in enumerate(intervals.tensors)
    }
    order = [*distinct]
    by_layer = [None if layout is None else order.index(id(layout)) for layout in layouts]
    heads = [layout.head_patterns for layout in distinct.values()]
    return {
        "base model": session.llama.config.to_dict(),
        "adapter": [session.adapter.model_dump(mode="json"), shapes_of(session.parameters)],
        "layout": [by_layer, heads, fingerprint(patterns)],
        "data": [session.total_steps, fingerprint(session.batches.sample())],
        "checkpoint": None if start is None else start.manifest(),
    }
