"""Layer inputs of a CUDA device in pinned host memory and on a drive: run with ``pytest -m gpu``."""

from typing import Any

import pytest
import torch
from adapted_models import adapt, tokens

from sparse_llama.adapters.attach import first_trained_layer, trainable_parameters
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.memory.checkpointing import checkpoint_layers, offload_engine
from sparse_llama.memory.offload import HostOffload, OffloadEngine, host_bytes_for
from sparse_llama.memory.offload_drive import NUM_THREADS, PIECE_BYTES, DriveOffload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_ELEMENTS = 20 * 2**20  # 80 MiB in fp32: two and a half pieces, and a copy takes 3 ms


@pytest.fixture(params=["host", "drive"])
def engine(request: pytest.FixtureRequest, tmp_path: Any) -> OffloadEngine:
    return HostOffload() if request.param == "host" else DriveOffload(tmp_path)


def busy(matrix: torch.Tensor) -> torch.Tensor:
    """Keep the current stream at work for some milliseconds."""
    for _ in range(10):
        matrix = (matrix @ matrix).clamp(-1, 1)
    return matrix


def test_copies_wait_for_the_computation_and_the_computation_for_them(engine):
    """Each tensor is made late, its memory is wanted again at once, and what comes back is used at once: one
    missing event and a value is another's."""
    matrix = torch.randn(4096, 4096, device="cuda")
    tickets = []
    for value in range(8):
        matrix = busy(matrix)
        tensor = torch.full((NUM_ELEMENTS,), float(value), device="cuda") + matrix[0, 0] * 0
        tickets.append(engine.store(tensor))
        del tensor
    found = []
    while tickets:
        tensor = engine.load(tickets.pop())
        found.append(torch.stack([tensor.min(), tensor.max()]))
        del tensor
        matrix = busy(matrix)
        torch.full((NUM_ELEMENTS,), -1.0, device="cuda")  # takes the memory just freed
    assert [pair.tolist() for pair in found] == [[float(value)] * 2 for value in reversed(range(8))]


def test_the_device_holds_two_tensors_and_the_host_no_more_than_all(engine):
    """The allocator's own peak, with the host far ahead of the device."""
    num_bytes = NUM_ELEMENTS * 4
    matrix = busy(torch.randn(4096, 4096, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tickets = []
    for value in range(8):
        busy(matrix)
        tickets.append(engine.store(torch.full((NUM_ELEMENTS,), float(value), device="cuda")))
    while tickets:
        engine.load(tickets.pop())
        busy(matrix)
    # one leaves or arrives, one is made or used; and the products of ``busy``
    assert torch.cuda.max_memory_allocated() - before <= 2 * num_bytes + 4 * matrix.nbytes
    if isinstance(engine, HostOffload):
        assert engine.host_bytes == host_bytes_for(num_bytes, 8)
    else:
        assert (engine.host_bytes, engine.drive_bytes) == (NUM_THREADS * PIECE_BYTES, 8 * num_bytes)


def test_buffers_are_pinned_exactly_and_unpinned():
    """80 MiB are not rounded to 128, and memory that is given back is not left registered."""
    engine = HostOffload()
    ticket = engine.store(torch.zeros(NUM_ELEMENTS, device="cuda"))
    buffer = ticket.lease.slot
    assert buffer.data.is_pinned()
    assert buffer.data.untyped_storage().nbytes() == NUM_ELEMENTS * 4
    data = buffer.data
    del engine, ticket, buffer
    torch.cuda.synchronize()
    assert not data.is_pinned()


def test_a_graph_thrown_away_does_not_disturb_the_next(engine):
    """Memory of a fetch that nobody waits for must not be another tensor's yet."""
    for value in range(4):
        tickets = [engine.store(torch.full((NUM_ELEMENTS,), float(value), device="cuda")) for _ in range(3)]
        engine.load(tickets[2])
        engine.load(tickets[1])  # which starts to fetch the first
        del tickets
        tensor = torch.full((NUM_ELEMENTS,), -1.0, device="cuda")
        torch.cuda.synchronize()
        assert tensor.max() == -1


@pytest.mark.parametrize("number_checkpoints", [None, 2])
@pytest.mark.parametrize("is_on_drive", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gradients_are_those_without_offload(tiny_llama, version, is_on_drive, number_checkpoints, tmp_path):
    """Step after step: a place that is used again must not bring back the last step's input."""

    def gradients(settings: ActivationCheckpointing) -> list[dict[str, torch.Tensor]]:
        model = adapt(tiny_llama(), version).to("cuda").train()
        drive = str(tmp_path) if is_on_drive else None
        checkpoint_layers(model, settings, first_trained_layer(model), nvme_path=drive)
        steps = []
        for _ in range(3):
            model.zero_grad()
            ids = tokens(num_tokens=40).cuda()
            model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[..., 0].sum().backward()
            steps.append({name: p.grad.clone() for name, p in trainable_parameters(model)})
        engine = offload_engine(model)
        assert (engine is not None and engine.num_stored > 0) == settings.cpu_checkpointing
        return steps

    expected = gradients(ActivationCheckpointing())
    found = gradients(ActivationCheckpointing(cpu_checkpointing=True, number_checkpoints=number_checkpoints))
    for one, other in zip(found, expected, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
