"""The Triton kernels compiled for A100 and H100, on a machine that has neither: they fit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # of a thread block, CUDA programming guide, table 30
MOST_SPILLED = 32  # bytes a thread: a few registers around the loops, none in them
REPORT = """
import json, sys
from dataclasses import asdict
import torch
from sparse_llama.attention.triton_compile import compile_report
options = json.loads(sys.argv[1])
for line in compile_report(**options | {"dtypes": [getattr(torch, name) for name in options["dtypes"]]}):
    print(json.dumps(asdict(line)))
"""
ONE_KERNEL = """
from sparse_llama.attention import triton_kernels
from sparse_llama.attention.tiles import Tile
from sparse_llama.attention.triton_compile import compile_kernel
tile = Tile(queries=128, keys=64, num_warps=4, num_stages=2)
print(compile_kernel(triton_kernels.forward, tile, capability=80, width=128, block=16).spill_bytes)
"""


def run_compiled(program: str, *arguments: str) -> list[str]:
    """Return the lines that a process prints in which kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def report(**options: Any) -> list[dict[str, Any]]:
    options = {"dtypes": ["bfloat16"]} | options
    return [json.loads(line) for line in run_compiled(REPORT, json.dumps(options))]


def check(lines: list[dict[str, Any]], num_lines: int) -> None:
    assert len(lines) == num_lines
    for line in lines:
        assert line["shared_bytes"] <= SHARED_BYTES[line["capability"]], line
        if line["width"] <= 128:
            assert line["spill_bytes"] <= MOST_SPILLED, line


def test_every_kernel_fits_an_a100_and_an_h100():
    lines = report(widths=[64, 128], capabilities=[80, 90], blocks=[16])
    check(lines, num_lines=4 * 2 * 2)
    assert {line["kernel"] for line in lines} == {"forward", "grad_query", "grad_key_value", "add_partials"}


def test_a_tile_that_is_too_large_is_seen_to_spill():
    """Else finding no spills would prove nothing."""
    assert int(run_compiled(ONE_KERNEL)[-1]) > 4 * MOST_SPILLED


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [["bfloat16"], ["float16"], ["float32"]])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_every_width_and_block_fits(width: int, capability: int, dtypes: list[str]):
    blocks = [16, 32, 64, 128]
    lines = report(widths=[width], capabilities=[capability], blocks=blocks, dtypes=dtypes)
    check(lines, num_lines=4 * len(blocks))
    worst = max(line["spill_bytes"] for line in lines)
    print(f"sm_{capability}, {dtypes[0]}, width {width}: at most {worst} bytes of spills a thread")
