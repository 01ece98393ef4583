"""What is sent to host memory or to a drive comes back, takes no more than it should, and leaves nothing."""

import contextlib
import errno
import gc
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapt, tokens
from live_storages import LiveStorages
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import first_trained_layer, trainable_parameters
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.errors import OffloadError
from sparse_llama.memory import offload_drive
from sparse_llama.memory.checkpointing import checkpoint_layers, offload_engine
from sparse_llama.memory.offload import HostOffload, OffloadEngine, Stored, host_bytes_for
from sparse_llama.memory.offload_drive import NUM_THREADS, PIECE_BYTES, DriveOffload

SETTINGS = ActivationCheckpointing(cpu_checkpointing=True)
INPUT_BYTES = 2 * 9 * 32 * 4  # (B, T, C) in fp32


@pytest.fixture(params=["host", "drive"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> OffloadEngine:
    return HostOffload() if request.param == "host" else DriveOffload(tmp_path)


def held_bytes(engine: OffloadEngine) -> int:
    return engine.host_bytes + engine.drive_bytes


def send(engine: OffloadEngine, tensors: list[torch.Tensor]) -> list[Stored]:
    """Store copies, so that what comes back must have been somewhere else."""
    return [engine.store(tensor.clone()) for tensor in tensors]


def num_open_files(folder: Path) -> int:
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing itself
            found += os.readlink(descriptor).startswith(str(folder))
    return found


def drive_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("drive")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_everything_comes_back_as_it_went(engine, dtype, monkeypatch):
    """In any order and any number of times, in pieces that do not divide a tensor."""
    monkeypatch.setattr(offload_drive, "PIECE_BYTES", 100)
    tensors = [torch.randn(2, 5, 7).to(dtype) for _ in range(5)]
    tickets = send(engine, tensors)
    for index in (4, 3, 0, 1, 2, 2, 4):
        assert torch.equal(engine.load(tickets[index]), tensors[index])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_odd_shapes_come_back(engine, shape):
    tensors = [torch.randn(shape) for _ in range(3)]
    tickets = send(engine, tensors)
    for ticket, tensor in zip(reversed(tickets), reversed(tensors), strict=True):
        assert torch.equal(engine.load(ticket), tensor)


def test_a_view_comes_back_as_what_it_shows(engine):
    tensor = torch.randn(4, 6)
    shown = [tensor.T, tensor[1:3, ::2], tensor[:1].expand(3, 6)]
    tickets = [engine.store(view) for view in shown]
    for ticket, view in zip(reversed(tickets), reversed(shown), strict=True):
        assert torch.equal(engine.load(ticket), view)
    assert engine.stored_bytes == 4 * (24 + 6 + 18)


def test_one_tensor_waits_to_leave_and_one_is_fetched_ahead(engine):
    """Bounded on the way out and in: the device holds two tensors besides, not as many as there are."""
    with LiveStorages(6400) as alive:
        tickets = []
        for _ in range(6):
            tensor = torch.randn(1600)
            tickets.append(engine.store(tensor))
            del tensor
        in_slots = 6 if engine.host_bytes else 0
        assert alive.count == in_slots + 1
        first = engine.load(tickets.pop())
        assert engine.loaded_bytes == 6400  # the last had not left; the one before it is on its way
        del first
        alive.peak = 0
        while tickets:
            tensor = engine.load(tickets.pop())
            del tensor
        assert alive.peak == in_slots + 2
        assert alive.count == in_slots
    assert (engine.num_stored, engine.stored_bytes, engine.loaded_bytes) == (6, 6 * 6400, 5 * 6400)


def test_places_are_used_again_and_only_grow(engine):
    """A longer micro-batch gets larger places, in turn and not beside the old ones; a shorter one no more."""
    gc.disable()  # nothing here may wait for the collector
    try:
        held = []
        for length in (10, 10, 4, 20, 6, 20):
            tickets = send(engine, [torch.randn(length) for _ in range(3)])
            held.append(held_bytes(engine))
            while tickets:
                engine.load(tickets.pop())
    finally:
        gc.enable()
    assert held == [120, 120, 120, 240, 240, 240]


def test_host_bytes_are_those_of_the_inputs_exactly(tiny_llama, tmp_path):
    """Memory trap 6: (layers - start_layer) inputs, the lowest one's too. The planner asks beforehand."""
    for version, num_layers in (("v1", 2), ("v2", 4)):
        for drive in (None, str(tmp_path)):
            model = adapt(tiny_llama(), version, start_layer=2).train()
            checkpoint_layers(model, SETTINGS, first_trained_layer(model), nvme_path=drive)
            engine = offload_engine(model)
            assert engine is not None
            for _ in range(2):
                model(input_ids=tokens(), use_cache=False).logits.sum().backward()
                assert engine.host_bytes == (0 if drive else host_bytes_for(INPUT_BYTES, num_layers))
                assert engine.drive_bytes == (num_layers * INPUT_BYTES if drive else 0)
            assert engine.stored_bytes == 2 * num_layers * INPUT_BYTES
            # the last input has not left when it is asked for
            assert engine.loaded_bytes == 2 * (num_layers - 1) * INPUT_BYTES


@pytest.mark.parametrize("number_checkpoints", [None, 2])
@pytest.mark.parametrize("is_on_drive", [False, True])
def test_a_step_without_data_takes_the_same_bytes(tiny_llama, is_on_drive, number_checkpoints):
    """The planner's step: device "meta" is the accelerator and "cpu" the host, and no file is made."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config).train()
        ids = torch.zeros(2, 9, dtype=torch.int64)
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.input_layernorm.weight.requires_grad_(True)
    settings = ActivationCheckpointing(cpu_checkpointing=True, number_checkpoints=number_checkpoints)
    folder = "/no/such/folder" if is_on_drive else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        checkpoint_layers(model, settings, 0, nvme_path=folder)
        engine = offload_engine(model)
        assert engine is not None
        with LiveStorages(INPUT_BYTES, "cpu") as on_host, LiveStorages(INPUT_BYTES, "meta") as on_device:
            loss = model(input_ids=ids, use_cache=False).logits.sum()
            num_kept = number_checkpoints or 4
            assert on_host.count == (0 if is_on_drive else num_kept)
            assert on_device.count == 2  # the last input on its way out, and the norm's
            loss.backward()
            assert on_device.count == 0
    assert engine.host_bytes == (NUM_THREADS * PIECE_BYTES if is_on_drive else num_kept * INPUT_BYTES)
    assert engine.drive_bytes == (num_kept * INPUT_BYTES if is_on_drive else 0)
    assert model.model.layers[0].input_layernorm.weight.grad is not None


def test_a_drive_takes_no_host_memory_and_shows_no_file(tmp_path):
    """However the process ends, nothing is left: files have no name. They are not the page cache's guess
    either: their bytes are reserved."""
    engine = DriveOffload(tmp_path)
    tickets = send(engine, [torch.randn(1000) for _ in range(3)])
    assert list(tmp_path.iterdir()) == []
    assert (engine.host_bytes, engine.drive_bytes) == (0, 12000)
    assert num_open_files(tmp_path) == 3
    for ticket in reversed(tickets):
        engine.load(ticket)  # after the last of them no thread is at work any more
    del ticket
    del engine, tickets
    gc.collect()
    assert num_open_files(tmp_path) == 0


def test_threads_end_with_the_model(tiny_llama, tmp_path):
    before = drive_threads()
    model = adapt(tiny_llama(), "v2").train()
    checkpoint_layers(model, SETTINGS, 0, nvme_path=str(tmp_path))
    model(input_ids=tokens(), use_cache=False).logits.sum().backward()
    started = [thread for thread in drive_threads() if thread not in before]
    assert started
    checkpoint_layers(model, None, 0)
    gc.collect()
    for thread in started:
        thread.join(timeout=5)
        assert not thread.is_alive()


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Return a function that limits the size of files that this process may write, as a full drive does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def line_of(caught: pytest.ExceptionInfo[OffloadError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_full_drive_is_one_line_in_the_forward_pass(tiny_llama, tmp_path, small_files):
    model = adapt(tiny_llama(), "v2").train()
    checkpoint_layers(model, SETTINGS, 0, nvme_path=str(tmp_path))
    small_files(1000)
    with pytest.raises(OffloadError) as caught:
        model(input_ids=tokens(), use_cache=False)
    small_files(resource.RLIM_INFINITY)
    assert line_of(caught) == (
        f"sparse_llama.memory.checkpoint_nvme_path: {tmp_path} cannot hold a layer input of 0.0 MiB (file "
        "too large); make room, name another with --nvme_path, or keep them in host memory with "
        "--checkpointing cpu"
    )
    assert list(tmp_path.iterdir()) == []
    del caught
    model(input_ids=tokens(), use_cache=False).logits.sum().backward()  # and nothing is broken


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "missing", "no such file or directory"),
        (lambda folder: ((folder / "file").write_text("") and None) or folder / "file", "not a directory"),
        (lambda folder: Path("/proc"), "no such file or directory"),  # as one that is mounted read-only
    ],
)
def test_a_folder_that_takes_no_file_is_one_line_before_the_first_step(tiny_llama, tmp_path, make, reason):
    folder = make(tmp_path)
    with pytest.raises(OffloadError) as caught:
        checkpoint_layers(tiny_llama(), SETTINGS, 0, nvme_path=str(folder))
    assert line_of(caught).startswith(
        f"sparse_llama.memory.checkpoint_nvme_path: {folder} cannot hold layer inputs ({reason}); make it "
        "a folder that takes files, "
    )


@pytest.mark.parametrize("failing", ["pwrite", "preadv"])
def test_a_drive_that_fails_in_the_middle_is_one_line_in_either_pass(
    tiny_llama, tmp_path, monkeypatch, failing
):
    """Out of a thread, through autograd, with its type; and the next step is as good as the first."""
    model = adapt(tiny_llama(), "v2").train()
    checkpoint_layers(model, SETTINGS, 0, nvme_path=str(tmp_path))

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, broken)
        with pytest.raises(OffloadError, match=r"layer inputs \(input/output error\); ") as caught:
            model(input_ids=tokens(), use_cache=False).logits.sum().backward()
    line_of(caught)
    del caught
    model.zero_grad()
    plain = adapt(tiny_llama(), "v2").train()
    for one in (model, plain):
        one(input_ids=tokens(), use_cache=False).logits.sum().backward()
    expected = dict(trainable_parameters(plain))
    for name, parameter in trainable_parameters(model):
        torch.testing.assert_close(parameter.grad, expected[name].grad)


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    """The kernel may move less than it was asked to."""
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: read(fd, [views[0][:5]], offset))
    engine = DriveOffload(tmp_path)
    tensors = [torch.randn(13) for _ in range(3)]
    tickets = send(engine, tensors)
    for ticket, tensor in zip(reversed(tickets), reversed(tensors), strict=True):
        assert torch.equal(engine.load(ticket), tensor)


def test_a_place_is_not_given_away_while_a_thread_still_writes_to_it(tmp_path, monkeypatch):
    """A graph thrown away in the middle: the next one's input must not be overwritten by the last one's."""
    write, goes_on = os.pwrite, threading.Event()

    def slow(*arguments: Any) -> int:
        goes_on.wait(5)
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", slow)
    engine = DriveOffload(tmp_path)
    engine.store(torch.zeros(1000))  # nobody holds the ticket, but a thread has the place
    tensors = [torch.ones(1000), torch.full((1000,), 2.0)]
    first = engine.store(tensors[0].clone())
    assert engine.drive_bytes == 8000
    goes_on.set()
    second = engine.store(tensors[1].clone())
    assert torch.equal(engine.load(second), tensors[1])
    assert torch.equal(engine.load(first), tensors[0])
