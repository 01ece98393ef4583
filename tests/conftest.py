"""What tests share: tiny models, a free port, a process of its own; everything on the CPU and offline."""

import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

# before torch and DeepSpeed are imported: they read these once
os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cpuinfo
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported

from fault_table import show_faults
from rank_processes import process_environment
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.distributed import ranks

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,  # not 32 / 4: nothing may divide where it should read the configuration
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough for attention to be far from uniform
}


def pytest_collection_finish() -> None:
    """Take what is imported out of the collector's sight: looking through it took a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Put it back, or Triton would report its own objects as leaked."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what became of the faults that tests injected; here, since a session of several processes loads no
    other conftest in the one that prints."""
    show_faults(terminalreporter)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make what a test has printed fit to be sent: fuzz prints half characters, over which xdist falls."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode("utf-8")) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session", autouse=True)
def _one_process() -> Iterator[None]:
    """Stay in the process group once it is joined: DeepSpeed cannot make a second one in a process, and a
    command that a test calls leaves it at its end. Ask what the CPU is once: DeepSpeed starts a process of
    1 s for that with every optimizer on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "finalize", lambda: None)
        patch.setattr(cpuinfo, "get_cpu_info", functools.cache(cpuinfo.get_cpu_info))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tokenised rows out of the user's cache, also those of processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_LLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., LlamaConfig]:
    """Return a function that makes the tiny configuration, with overrides."""
    return lambda **overrides: LlamaConfig(**(TINY | overrides))


@pytest.fixture(scope="session")
def tiny_llama(tiny_config: Callable[..., LlamaConfig]) -> Callable[..., LlamaForCausalLM]:
    """Return a function that makes a small random LLaMA, the same for the same overrides."""

    def make(**overrides: Any) -> LlamaForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = LlamaForCausalLM(tiny_config(**overrides))
            for (
                parameter
            ) in model.parameters():  # transformers starts norms at 1 and biases at 0, which hides mistakes
                if parameter.dim() == 1:
                    parameter.data += 0.2 * torch.randn_like(parameter)
        return model.eval()

    return make


@pytest.fixture
def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    return ranks.free_port()


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Return a function that runs Python source as the only rank of a job, in a process of its own.

    DeepSpeed keeps global state (process group, patched constructors) that must not reach other tests.
    """

    def run(source: str, *arguments: str, timeout_s: float = 120) -> str:
        environment = process_environment(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(ranks.free_port()),
        )
        done = subprocess.run(
            [sys.executable, "-c", source, *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def shared() -> Path:
    """Return the folder of reference data beside the repository; skip where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder
