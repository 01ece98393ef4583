"""Which core computes what: exact ones only, a slower one with a word, one that cannot run with an error."""

import importlib.util
import logging

import pytest
import torch

from sparse_llama.attention.blockwise import BlockwiseCore
from sparse_llama.attention.dispatch import choose_backend, make_core
from sparse_llama.attention.documents import whole_rows
from sparse_llama.attention.reference import ReferenceCore
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import build_layout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WINDOW = {"mode": "local_sliding_window", "num_sliding_window_blocks": 3}


def layout(block: int = 64):
    return build_layout(WINDOW | {"block": block}, 2, 8)


def core(backend: str, *, of=None, num_tokens: int = 300):
    documents = whole_rows(1, num_tokens)
    query = torch.zeros(1, 2, num_tokens, 8)
    return make_core(of, documents, query, scaling=0.1, backend=backend)  # type: ignore[arg-type]


def test_on_the_cpu_the_blocks_are_walked_and_the_definition_can_be_asked_for():
    sparse = layout()
    found = core("auto", of=sparse)
    assert isinstance(found, BlockwiseCore)
    assert found.chunked is not None
    assert found.chunked.layout is sparse
    assert isinstance(core("reference", of=sparse), ReferenceCore)


@pytest.mark.parametrize("backend", ["auto", "blockwise", "triton", "flex"])
def test_full_attention_is_pytorchs_own_whatever_is_asked_for(backend):
    for full in (None, build_layout({"mode": "dense", "block": 64}, 2, 8)):
        found = core(backend, of=full)
        assert isinstance(found, BlockwiseCore)
        assert found.chunked is None
    short = core(backend, of=layout(), num_tokens=100)
    assert isinstance(short, BlockwiseCore)
    assert short.chunked is None, "two blocks, which a window of three sees whole"


@pytest.mark.parametrize(
    ("device", "backend", "message"),
    [
        (CPU, "flex", "flex has no backward pass on the CPU; use auto, blockwise or reference"),
        (CPU, "triton", "triton needs a CUDA device; use auto, blockwise or reference"),
        (CUDA, "blockwise", "blockwise is made for the CPU; use auto, triton, flex or reference"),
    ],
)
def test_a_backend_of_another_device_is_one_line(monkeypatch, device, backend, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=f"sparse_llama.attention.backend: {message}"):
        choose_backend(layout(), device, torch.float32, 64, backend)


@pytest.mark.parametrize("block", [16, 32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_cuda_triton_computes_without_a_word(caplog, block, dtype):
    assert choose_backend(layout(block), CUDA, dtype, 128, "auto") == "triton"
    assert not caplog.records


def test_what_is_slower_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choose_backend(layout(5), CUDA, torch.bfloat16, 128, "auto") == "flex"
            assert choose_backend(layout(), CUDA, torch.float64, 128, "auto") == "reference"
    lines = [record.getMessage() for record in caplog.records]
    assert choose_backend(layout(), CUDA, torch.bfloat16, 320, "auto") == "flex"
    assert len(lines) == 2
    assert "flex computes what triton would, slower: a block of 5 tokens does not tile" in lines[0]
    assert "reference computes what triton would, slower: its kernels have no fp64" in lines[1]


def test_without_triton_flex_computes(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert choose_backend(layout(), CUDA, torch.bfloat16, 128, "auto") == "flex"
    assert "triton is not installed (pip install triton)" in caplog.text
