"""DeepSpeed's ops, the parts of it in C++ and CUDA, that runs of this project load."""

from pathlib import Path
from typing import Any

from sparse_llama.distributed.build_locks import builds_folder, wait_for_builds
from sparse_llama.errors import BuildError

_BUILDERS = {
    "deepspeed_shm_comm": "ShareMemCommBuilder",
    "cpu_adam": "CPUAdamBuilder",
    "cpu_adagrad": "CPUAdagradBuilder",
    "cpu_lion": "CPULionBuilder",
    "fused_adam": "FusedAdamBuilder",
    "fused_lion": "FusedLionBuilder",
    "pin_memory": "PinMemoryBuilder",
    "async_io": "AsyncIOBuilder",
}


def load_op(name: str) -> None:
    """Load an op, compiled first where it is not yet: up to minutes. Does nothing the second time.

    Raises:
        BuildError: it cannot be built here, or its build is locked for good.
    """
    builder = _builder(name)
    if builder is None:
        raise BuildError(f"{name}: DeepSpeed has no such op for this machine's accelerator")
    wait_for_builds([name])
    try:
        builder.load(verbose=False)
    except Exception as error:  # compilers, linkers, CUDA that is missing or another version: all sorts
        raise BuildError(
            f"{name}: this op of DeepSpeed's cannot be built here ({type(error).__name__}: "
            f"{_last_line(str(error))}); python launch/doctor.py says what is missing"
        ) from error


def is_compatible(name: str) -> bool:
    """Return whether DeepSpeed believes that the op can be built here; it says itself why not (on standard
    output)."""
    from deepspeed.ops.op_builder.builder import probe_is_compatible

    builder = _builder(name)
    return builder is not None and bool(probe_is_compatible(builder, verbose=True))


def exists_here(name: str) -> bool:
    """Return whether DeepSpeed has the op for this machine's accelerator at all."""
    return _builder(name) is not None


def is_built(name: str) -> bool:
    """Return whether the op was compiled already, at its first use or when DeepSpeed was installed."""
    from deepspeed.git_version_info import installed_ops

    is_installed: Any = installed_ops.get(name, False)
    return bool(is_installed) or library_of(name).is_file()


def library_of(name: str) -> Path:
    """Return the file that a build of the op ends with."""
    return builds_folder() / name / f"{name}.so"


def _builder(name: str) -> Any:
    from deepspeed.accelerator import get_accelerator

    builder: Any = get_accelerator().create_op_builder(_BUILDERS[name])  # pyright: ignore
    is_missing = builder is None or type(builder).__name__ == "NotImplementedBuilder"
    return None if is_missing else builder


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no word"
