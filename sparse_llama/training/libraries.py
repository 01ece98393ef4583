"""What a run loads beside its model, loaded before it is needed: where memory is limited or measured, that
has to be over before.

DeepSpeed imports torch's compiler when an engine starts (60 MiB, for an optimizer that is not used here), and
compiles its CPU optimizers and its drive access from source at their first use on a machine, for a minute and
with a gigabyte of the compiler's own.
"""

from sparse_llama.config.run import Run

_CPU_OPTIMIZERS = {
    "adam": "CPUAdamBuilder",
    "adamw": "CPUAdamBuilder",
    "adagrad": "CPUAdagradBuilder",
    "lion": "CPULionBuilder",
}


def load_libraries(run: Run) -> None:
    """Import and compile what an engine of ``run`` needs; does nothing the second time."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    from deepspeed.ops import op_builder  # its names are made at import: type checkers see none

    zero = run.deepspeed["zero_optimization"]
    devices = {zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param")}
    optimizer = _CPU_OPTIMIZERS.get(run.deepspeed["optimizer"]["type"].lower())
    if "offload_optimizer" in zero and optimizer is not None:
        getattr(op_builder, optimizer)().load(verbose=False)
    if "nvme" in devices:
        op_builder.AsyncIOBuilder().load(verbose=False)  # pyright: ignore[reportAttributeAccessIssue]
