"""The journal: when a storage appears and when it is released, on which device, and what crosses between."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from sparse_llama.planning.cpu_temporaries import CPU_TEMPORARIES
from sparse_llama.planning.phases import cut_into_phases, size_of
from sparse_llama.planning.tracker import MemoryTracker, Place


def gpu_tracker() -> MemoryTracker:
    host = FakeTensorMode(allow_non_fake_inputs=True)
    return MemoryTracker({"meta": "gpu", "cpu": "host"}, {}, host)


def peak_of(tracker: MemoryTracker, place: Place) -> int:
    return max(
        size_of(phase.peaks.get(place, phase.start), place) for phase in cut_into_phases(tracker.journal)
    )


def test_a_view_is_no_memory_and_a_released_tensor_none_any_more():
    tracker = gpu_tracker()
    with tracker:
        tracker.journal.begin("all")
        first = torch.empty(1024, device="meta")
        view = first[:10].view(2, 5)
        del first
        second = torch.empty(1024, device="meta")
        del view, second
        third = torch.empty(256, device="meta")
        tracker.journal.begin("end")
    assert peak_of(tracker, "gpu") == 2 * 4096
    assert size_of(cut_into_phases(tracker.journal)[-1].start, "gpu") == 1024
    del third


def test_small_tensors_take_512_bytes_on_a_gpu():
    tracker = gpu_tracker()
    with tracker:
        tracker.journal.begin("all")
        kept = [torch.empty(1, device="meta"), torch.empty(129, device="meta")]
    assert peak_of(tracker, "gpu") == 512 + 1024
    del kept


def test_copies_between_the_devices_are_traffic_and_memory_of_their_place():
    tracker = gpu_tracker()
    with tracker:
        tracker.journal.begin("all")
        tensor = torch.empty(1000, device="meta")
        host = tensor.to("cpu")
        del tensor
        slab = torch.empty(2000, device="cpu")
        slab[:1000].copy_(host)
        back = torch.empty(1000, device="meta")
        back.copy_(slab[:1000])
        again = host.to("meta")
        assert (back.is_meta, again.is_meta, host.device.type) == (True, True, "cpu")
    (phase,) = cut_into_phases(tracker.journal)
    assert phase.copied["gpu", "host"] == 4000
    assert phase.copied["host", "gpu"] == 8000
    assert peak_of(tracker, "host") == 4000 + 8000
    del slab


def test_autograd_and_checkpoints_release_what_they_release():
    """A checkpoint keeps its input; without one the product's factor is kept too."""
    weight = torch.empty(64, 64, device="meta", requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.tanh(x @ weight))

    kept = {}
    for name, call in (("plain", layer), ("checkpointed", None)):
        tracker = gpu_tracker()
        with tracker:
            tracker.journal.begin("forward")
            x = torch.empty(128, 64, device="meta")
            out = call(x) if call is not None else checkpoint(layer, x, use_reentrant=False)
            tracker.journal.begin("backward")
            out.sum().backward()
        kept[name] = size_of(cut_into_phases(tracker.journal)[1].start, "gpu")
        del x, out
    assert kept == {"plain": 3 * 128 * 64 * 4, "checkpointed": 2 * 128 * 64 * 4}


@pytest.mark.parametrize("name", ["mm", "sum", "softmax", "cat", "add_"])
def test_a_remembered_result_has_the_shape_strides_and_type_of_a_new_one(name):
    """Results of loops over tiles are made again from the first; views and writes in place are not."""

    def run(device: str) -> list[torch.Tensor]:
        x = torch.ones(6, 4, device=device)
        y = torch.ones(4, 6, device=device).t()
        return {
            "mm": lambda: [x @ x.t(), x @ y.t(), (x @ x.t()).to(torch.bfloat16)],
            "sum": lambda: [x.sum(0), x.sum(0, keepdim=True), x.sum(0, dtype=torch.float64)],
            "softmax": lambda: [x.softmax(-1), y.softmax(0)],
            "cat": lambda: [torch.cat([x, x]), torch.cat([x, x], 1)],
            "add_": lambda: [x.add_(1), x.t().mul_(2), x.view(-1)],
        }[name]()

    expected = run("cpu")
    tracker = gpu_tracker()
    with tracker:
        for _ in range(2):
            found = run("meta")
            for one, real in zip(found, expected, strict=True):
                assert (one.shape, one.stride(), one.dtype) == (real.shape, real.stride(), real.dtype)


def test_reading_data_that_is_not_there_is_an_error():
    with gpu_tracker(), pytest.raises(RuntimeError):
        torch.empty(2, device="meta").sum().item()


def test_what_stands_for_many_tiles_counts_as_many():
    tracker = gpu_tracker()
    with tracker:
        tracker.journal.begin("all")
        x = torch.empty(8, 8, device="meta")
        with tracker.standing_for(5):
            torch.mm(x, x)
        torch.mm(x, x)
    (phase,) = cut_into_phases(tracker.journal)
    assert phase.flops == 6 * 2 * 8 * 8 * 8


@pytest.mark.parametrize("name", ["mul", "mul_", "narrow_out", "sum", "row", "same"])
def test_declared_temporaries_of_the_cpu(name):
    """An operand of another type is cast whole, as the allocator's own events say."""
    from allocator_events import peak_bytes

    wide, narrow = torch.ones(300, 300), torch.ones(300, 300, dtype=torch.bfloat16)
    row = narrow[0].clone()
    call = {
        "mul": lambda: wide * narrow,
        "mul_": lambda: wide.mul_(narrow),
        "narrow_out": lambda: narrow.mul_(wide),
        "sum": lambda: narrow.sum(0, dtype=torch.float32),
        "row": lambda: wide * row,
        "same": lambda: wide * wide,
    }[name]
    measured = peak_bytes(call)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = MemoryTracker({"cpu": "host"}, CPU_TEMPORARIES, None)
    with fake:
        wide, narrow, row = (fake.from_tensor(tensor) for tensor in (wide, narrow, row))
    with fake, tracker:
        for tensor in (wide, narrow, row):
            tracker.note(tensor)
        tracker.journal.begin("before")
        tracker.journal.begin("call")
        kept = call()
    phase = cut_into_phases(tracker.journal)[-1]
    assert size_of(phase.peaks["host"], "host") - size_of(phase.start, "host") == measured
    del kept
    gc.collect()
