"""What a run loads beside its model, loaded before it is needed: where memory is limited or measured, that
has to be over before.

DeepSpeed imports torch's compiler when an engine starts (60 MiB, for an optimizer that is not used here), and
compiles its CPU optimizers and its drive access from source at their first use on a machine, for a minute and
with a gigabyte of the compiler's own.
"""

from sparse_llama.config.run import Run
from sparse_llama.distributed.ops import load_op

_OFFLOADS = ("offload_optimizer", "offload_param")
_HOST_OPTIMIZERS = {"adam": "cpu_adam", "adamw": "cpu_adam", "adagrad": "cpu_adagrad", "lion": "cpu_lion"}
_FUSED_OPTIMIZERS = {"adam": "fused_adam", "adamw": "fused_adam", "lion": "fused_lion"}


def load_libraries(run: Run) -> None:
    """Import and compile what an engine of ``run`` needs; does nothing the second time.

    Raises:
        BuildError: an op cannot be built here.
    """
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    for name in ops_of(run):
        load_op(name)


def ops_of(run: Run) -> list[str]:
    """Return the names of the ops of DeepSpeed's that an engine of ``run`` loads."""
    zero, optimizer = run.deepspeed["zero_optimization"], run.deepspeed["optimizer"]
    devices = {name: zero.get(name, {}).get("device", "none") for name in _OFFLOADS}
    kind, names = optimizer["type"].lower(), []
    is_torchs = kind.startswith("adam") and optimizer["params"].get("torch_adam", run.offload == "none")
    if not is_torchs:
        is_on_host = devices["offload_optimizer"] != "none"
        names = [(_HOST_OPTIMIZERS if is_on_host else _FUSED_OPTIMIZERS).get(kind)]
    if "nvme" in devices.values():
        names += ["pin_memory", "async_io"]
    return [name for name in names if name is not None]
