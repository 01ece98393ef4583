"""The CUDA cores against the definition: run with ``pytest -m gpu`` on a machine that has one."""

import pytest
import torch
from attention.test_cores import MODES, ROWS, SCALING, draw, make_layout, run
from oracles.masked_attention import attend, batch_table, relative_error

from sparse_llama.attention.blockwise import BlockwiseCore
from sparse_llama.attention.core import CoreAttention
from sparse_llama.attention.documents import find_documents
from sparse_llama.attention.flex import FlexCore, block_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("mode", ["full", *(mode for mode in MODES if mode not in ("full", "dense"))])
def test_a_cuda_core_is_as_near_to_fp64_as_the_definition_in_its_own_precision(mode, num_kv_heads, dtype):
    layout, positions = make_layout(mode), ROWS["packed"]
    table = batch_table(layout, 4, positions).cuda()
    *inputs, grad = (tensor.repeat(1, 1, 1, 8).cuda() for tensor in draw(num_kv_heads, dtype))  # heads of 64
    documents = find_documents(positions, 2)
    if layout is None:
        core = BlockwiseCore(None, documents, SCALING)
    else:
        core = FlexCore(block_mask(layout, documents, torch.device("cuda")), SCALING)
    exact = run(lambda q, k, v: attend(q, k, v, table, SCALING), [t.double() for t in inputs], grad.double())
    naive = run(lambda q, k, v: attend(q, k, v, table, SCALING), inputs, grad)
    found = run(lambda q, k, v: CoreAttention.apply(core, q, k, v), inputs, grad)
    for name, actual, same_dtype, wanted in zip(("o", "dq", "dk", "dv"), found, naive, exact, strict=True):
        slack = 2.0 if dtype == torch.float32 else 1.2
        assert relative_error(actual, wanted) <= slack * relative_error(same_dtype, wanted), name
