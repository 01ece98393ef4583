"""A plain export converts for llama.cpp and computes there what the adapted model computes.

    pytest -m slow tests/export/test_llama_cpp.py

builds llama.cpp from the source distribution of llama-cpp-python, which also brings the converter: minutes.
"""

import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_runs import LLAMA_3, formula, ids
from oracles.masked_attention import relative_error

from sparse_llama.export import export_merged

VERSION = "0.3.36"
BUILD = " ".join(
    f"-D{name}=OFF"
    for name in (
        "GGML_NATIVE",
        "GGML_OPENMP",
        "LLAVA_BUILD",
        "MTMD_BUILD",
        "LLAMA_CURL",
        "LLAMA_BUILD_EXAMPLES",
        "LLAMA_BUILD_SERVER",
        "LLAMA_BUILD_TESTS",
        "LLAMA_BUILD_TOOLS",
    )
)
BASES: dict[str, dict[str, Any]] = {
    "gqa, explicit head_dim": {},
    "llama 3, tied": {"rope_parameters": LLAMA_3, "tie_word_embeddings": True},
}
THEIR_SIDE = """
import json, sys
import llama_cpp, numpy
model_file, ids_file, logits_file = sys.argv[1:]
ids = json.load(open(ids_file))
# keys and values in fp32: they are fp16 by default
model = llama_cpp.Llama(model_file, n_ctx=64, n_batch=64, logits_all=True, type_k=0, type_v=0, n_threads=1)
model.eval(ids)
numpy.save(logits_file, model.scores[: len(ids)])
"""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp in an environment of its own."""

    python: Path
    source: Path


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    """Build llama.cpp."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    pip, package = [sys.executable, "-m", "pip"], f"llama-cpp-python=={VERSION}"
    how: dict[str, Any] = {"check": True, "capture_output": True}
    download = [*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), package]
    subprocess.run(download, timeout=900, **how)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "environment")], timeout=300, **how)
    python = folder / "environment" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", str(archive)]
    subprocess.run(install, env=os.environ | {"CMAKE_ARGS": BUILD}, timeout=3600, **how)
    (source,) = folder.glob("llama_cpp_python-*/vendor/llama.cpp")
    return LlamaCpp(python, source)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_llama_cpp_computes_the_formula_of_what_was_not_left_out(
    llama_cpp, trained_run, write_run_json, tmp_path, base
):
    run = trained_run("v2", **BASES[base])
    write_run_json(run.folder)
    export_merged(run.folder, tmp_path / "out", leave_out=["prompt", "head_bias"])
    convert = [sys.executable, str(llama_cpp.source / "convert_hf_to_gguf.py"), str(tmp_path / "out")]
    convert += ["--outfile", str(tmp_path / "out.gguf"), "--outtype", "f32"]
    environment = os.environ | {"PYTHONPATH": str(llama_cpp.source / "gguf-py")}
    done = subprocess.run(convert, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "ids.json").write_text(str(ids()[0].tolist()))
    files = [str(tmp_path / name) for name in ("out.gguf", "ids.json", "logits.npy")]
    command = [str(llama_cpp.python), "-c", THEIR_SIDE, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.from_numpy(np.load(files[2]))
    expected = formula(run, {}, without=("zero_init.gate", "lm_head.adapter_bias"))[0]
    assert relative_error(found, expected) < 1e-4
