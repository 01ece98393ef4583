"""A step put together from a few layers is the step of all of them, to the byte."""

from typing import Any

import pytest
from planned_runs import FIXED, SMALL, document, llama, run_of

from sparse_llama.planning import planned_step
from sparse_llama.planning.phases import size_of
from sparse_llama.planning.planned_step import make_batch, plan_step
from sparse_llama.planning.sample import Sample, choose_layers
from sparse_llama.planning.tracker import Place

PLACES: tuple[Place, ...] = ("gpu", "host")
HOST = {"cpu_checkpointing": True}
TILES = {"norm_tile": 64, "mlp_tile": 64, "loss_tile": 64}  # four to a row
CASES: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"version": "v2"},
    "v2 on the top layers": {"version": "v2", "adapter": {"top_layers": 7}, "checkpointing": {}},
    "v1 checkpointed": {"checkpointing": {}},
    "v1 on the host in tiles": {"checkpointing": HOST, "memory": TILES},
    "v2 on the host": {"version": "v2", "checkpointing": HOST},
    "v2 every second input": {"version": "v2", "checkpointing": HOST | {"number_checkpoints": 6}},
    "v1 every third of ten": {"checkpointing": HOST | {"number_checkpoints": 4}},
    "v2 every fifth of twelve": {"version": "v2", "checkpointing": {"number_checkpoints": 3}},
    "v2 head groups": {"version": "v2", "memory": TILES | {"head_groups": 2}, "checkpointing": HOST},
    "v2 sparse, every third layer dense": {
        "version": "v2",
        "checkpointing": HOST,
        "sparse_attention": FIXED,
        "dense": "::3",
    },
    "v2 from the fifth layer on": {"version": "v2", "adapter": {"start_layer": 5}, "checkpointing": HOST},
}


def all_layers(adapter: Any, checkpointing: Any, layouts: Any) -> Sample:
    everything = tuple(range(len(layouts)))
    return Sample(everything, everything, adapter, checkpointing)


BY_DEFAULT = ("v1", "v2 every second input", "v2 sparse, every third layer dense", "v2 head groups")


@pytest.mark.parametrize(
    "case", [case if case in BY_DEFAULT else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_few_layers_say_what_all_would(case, tmp_path, monkeypatch):
    """The peak is a maximum over phases: were a layer not like the one that stands in for it, the peak of a
    deep model would be wrong, and only there."""
    settings = dict(CASES[case])
    dense = settings.pop("dense", None)
    made = document(256, **settings)
    if dense is not None:
        made["sparse_llama"]["attention"] = {"dense_layers": dense}
    run, config, batch = run_of(tmp_path, made), llama(SMALL), make_batch(1, 256, None, None)
    few = plan_step(run, config, "cuda", batch)
    sample = choose_layers(run.settings.adapter, run.checkpointing, run.layouts.resolve(12))  # type: ignore[arg-type]
    monkeypatch.setattr(planned_step, "choose_layers", all_layers)
    whole = plan_step(run, config, "cuda", batch)
    assert len(sample.layers) <= 12
    assert [(one.label, one.layer) for one in few.phases] == [(one.label, one.layer) for one in whole.phases]
    for found, expected in zip(few.phases[1:], whole.phases[1:], strict=True):
        for place in PLACES:
            assert size_of(found.peaks.get(place, found.start), place) == size_of(
                expected.peaks.get(place, expected.start), place
            ), (found.label, found.layer, place)
        assert found.copied == expected.copied, (found.label, found.layer)
        assert found.flops == expected.flops, (found.label, found.layer)
    assert few.saved_bytes_per_token() == whole.saved_bytes_per_token()
    assert sum(one.numel for one in few.parameters) == sum(one.numel for one in whole.parameters)


@pytest.mark.parametrize(("num_layers", "kept"), [(32, 6), (80, 6), (3, 3)])
def test_a_deep_model_costs_no_more_than_a_shallow_one(num_layers, kept, tmp_path):
    run = run_of(tmp_path, document(256, checkpointing=HOST))
    assert len(choose_layers(run.settings.adapter, run.checkpointing, [None] * num_layers).layers) == kept
