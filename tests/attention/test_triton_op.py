"""The Triton kernels as operations: what autograd, compile, checkpointing and fake tensors see."""

import os
from functools import partial
from typing import Any

import pytest
import torch
from attention.test_cores import SCALING, run
from attention.test_triton import TILES, draw, layout_of, rows_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sparse_llama.attention import triton_op
from sparse_llama.attention.core import CoreAttention
from sparse_llama.attention.documents import find_documents
from sparse_llama.attention.tiles import TiledLayout
from sparse_llama.attention.triton_op import TritonCore
from sparse_llama.errors import ConfigError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="interpreted here; on a GPU tests/gpu runs the kernels"
)


def small_operation(**options: Any) -> tuple[TritonCore, list[torch.Tensor], torch.Tensor]:
    """Return a core, its inputs and a gradient that take the interpreter little time."""
    layout = layout_of("fixed", 16, 50)
    core = TritonCore(
        TiledLayout(layout, tiles=TILES["usual"], **options),
        find_documents(rows_of("whole", 50, 16), 2),
        SCALING,
    )
    *inputs, grad = draw(50, 2)
    return core, inputs, grad


def arguments(core: TritonCore, inputs: list[torch.Tensor]) -> tuple[Any, ...]:
    """Return what ``TritonCore.attend`` calls the operation with."""
    launches = core.tiled.launches(core.documents, inputs[0], inputs[1].shape[1])
    return (*inputs, SCALING, True, *launches.forward, *launches.grad_query, *launches.grad_key)


def test_the_operation_is_registered_as_pytorch_wants_it():
    core, inputs, _ = small_operation()
    leaves = [tensor.requires_grad_() for tensor in inputs]
    torch.library.opcheck(triton_op.block_sparse_attention, arguments(core, leaves))


def test_the_operation_differentiates_as_the_core_does():
    core, inputs, grad = small_operation()
    expected = run(lambda q, k, v: CoreAttention.apply(core, q, k, v), inputs, grad)
    for actual, wanted in zip(run(core.attend, inputs, grad), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_compile_sees_one_operation_and_breaks_no_graph():
    core, inputs, grad = small_operation()
    rest = arguments(core, inputs)[3:]

    def double(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return 2 * triton_op.block_sparse_attention(query, key, value, *rest)[0]

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(run(compiled, inputs, grad), run(double, inputs, grad), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_fake_tensors_get_shapes_and_strides_without_a_run(monkeypatch: pytest.MonkeyPatch):
    core, inputs, grad = small_operation()
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)  # its strides are those of o and dq
    real = run(core.attend, inputs, grad)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    values = arguments(core, inputs)

    def refuse(*_: Any) -> None:
        raise AssertionError("a kernel ran")

    for name in ("run_forward", "run_grad_query", "run_grad_key_value"):
        monkeypatch.setattr(triton_op, name, refuse)
    with FakeTensorMode() as mode:

        def faked(value: Any) -> Any:
            if isinstance(value, list):
                return [faked(item) for item in value]
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        query, key, value, *rest = (faked(value) for value in values)
        output, lse = triton_op.block_sparse_attention(query, key, value, *rest)
        grads = torch.autograd.grad(output, (query, key, value), faked(grad))
    assert (lse.shape, lse.dtype) == ((2, 4, 50), torch.float32)
    assert not lse.requires_grad
    for fake, wanted in zip((output, *grads), real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def save_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_ours = op is torch.ops.sparse_llama.block_sparse_attention.default
    return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    ("kind", "num_runs"),
    [("none", 1), ("non-reentrant", 2), ("reentrant", 2), ("selective", 1)],
)
@pytest.mark.parametrize("through", ["core", "operation"])
def test_checkpointing_runs_the_forward_kernel_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch, kind: str, num_runs: int, through: str
):
    core, inputs, grad = small_operation()
    runs: list[int] = []
    forward = triton_op.run_forward
    monkeypatch.setattr(triton_op, "run_forward", lambda *args: (runs.append(1), forward(*args)))

    def block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        doubled = query * 2
        attended = (
            core.attend(doubled, key, value)
            if through == "operation"
            else CoreAttention.apply(core, doubled, key, value)
        )
        return attended.sin()

    wrapped = {
        "none": block,
        "non-reentrant": partial(checkpoint, block, use_reentrant=False),
        "reentrant": partial(checkpoint, block, use_reentrant=True),
        "selective": partial(
            checkpoint,
            block,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, save_attention),
        ),
    }[kind]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = wrapped(*leaves)
    output.backward(grad)  # reentrant checkpoints refuse torch.autograd.grad
    assert len(runs) == num_runs
    found = [output, *(leaf.grad for leaf in leaves)]
    for actual, wanted in zip(found, run(block, inputs, grad), strict=True):
        assert torch.equal(actual, wanted)


def test_a_batch_is_worked_out_once_for_all_layers_and_anew_for_the_next():
    core, inputs, _ = small_operation()
    launches = core.tiled.launches(core.documents, inputs[0], 2)
    assert core.tiled.launches(core.documents, inputs[0], 2) is launches
    packed = find_documents(rows_of("packed", 50, 16), 2)
    assert core.tiled.launches(packed, inputs[0], 2) is not launches


def test_tables_that_inference_asked_for_first_serve_training():
    core, inputs, grad = small_operation()
    with torch.inference_mode():
        core.forward(*inputs)
    run(core.attend, inputs, grad)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 4, 16, 300), "heads of up to 256, got torch.float32 heads of 300; use auto"),
        (torch.zeros(1, 4, 16, 16, dtype=torch.float64), "takes fp32, fp16 and bf16 .* got torch.float64"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_in_one_line(tensor: torch.Tensor, message: str):
    core, _, _ = small_operation()
    with pytest.raises(ConfigError, match=message):
        core.forward(tensor, tensor, tensor)


def test_a_scale_that_is_not_positive_is_refused():
    core, _, _ = small_operation()
    with pytest.raises(ConfigError, match=r"scale: .* got -0.5; negate q instead"):
        TritonCore(core.tiled, core.documents, -0.5)
