"""The fp32 masters and optimizer moments of a DeepSpeed engine, by parameter name, whatever its ZeRO stage.

DeepSpeed keeps them in four shapes: as the parameters themselves (fp32, stage 0), as a list beside them (bf16
or fp16, stage 0), as each rank's slice of one flat buffer per parameter group (stages 1 and 2), and as each
rank's slice of each parameter (stage 3). Here every shape is seen as *fragments*: 1-D views of the master and
of its moments that start somewhere in the flattened parameter. Reading adds the ranks' fragments up, writing
copies slices into them, so a checkpoint written at one stage and number of ranks continues at any other.

``deepspeed.utils.safe_get_full_optimizer_state`` is not used for stages 1 and 2: with more than one parameter
group it links the moments after the first group's first step, when the other groups have none yet, and raises
``exp_avg not found`` ever after (DeepSpeed 0.19.8, ``stage_1_and_2.py``,
``_lazy_init_hp_params_optimizer_state``).

DeepSpeed's optimizer wrappers have no types; ``Any`` stands for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparse_llama.distributed.ranks import all_reduce_sum, rank, world_size


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter: ``flat`` owns the optimizer state, ``view`` lies in ``flat``."""

    start: int  # of the fragment in the flattened parameter
    flat: torch.Tensor  # the tensor that the optimizer steps
    offset: int  # of the fragment in ``flat``
    numel: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the fragment's 1-D view of ``tensor``, which is ``flat`` or one of its moments."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def read_masters(engine: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the fp32 master of every named parameter, on the CPU, whole; every rank must call it."""
    fragments = dict(_fragments(engine, parameters))
    return {
        name: _gather(parameter, fragments.get(name), lambda fragment: fragment.of(fragment.flat))
        for name, parameter in parameters.items()
    }


def read_moments(engine: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the optimizer's moments as ``{moment/name: tensor}``; empty before the first step; every rank
    must call it."""
    state = _optimizer(engine).state
    fragments = dict(_fragments(engine, parameters))
    moments: dict[str, torch.Tensor] = {}
    for key in _moment_keys(engine):
        for name, parameter in parameters.items():
            moments[f"{key}/{name}"] = _gather(
                parameter,
                fragments.get(name),
                lambda fragment, key=key: fragment.of(state[fragment.flat][key]),
            )
    return moments


def read_optimizer_step(engine: Any) -> int:
    """Return how many updates the optimizer's bias correction has counted."""
    steps = {int(entry["step"]) for entry in _optimizer(engine).state.values() if "step" in entry}
    assert len(steps) <= 1, f"parameter groups disagree about the step: {steps}"
    return steps.pop() if steps else 0


def write_masters(engine: Any, parameters: dict[str, nn.Parameter], masters: dict[str, torch.Tensor]) -> None:
    """Copy whole ``masters`` into this rank's fragments and into the parameters the model computes with."""
    for name, fragment in _fragments(engine, parameters):
        whole = masters[name].reshape(-1)
        fragment.of(fragment.flat).copy_(whole.narrow(0, fragment.start, fragment.numel))
    for name, parameter in parameters.items():
        _set_compute_copy(parameter, masters[name])


def write_moments(
    engine: Any, parameters: dict[str, nn.Parameter], moments: dict[str, torch.Tensor], step: int
) -> None:
    """Copy ``{moment/name: tensor}`` and the update count into this rank's optimizer, as if it had made the
    steps."""
    optimizer = _optimizer(engine)
    keys = sorted({key.split("/", 1)[0] for key in moments})
    optimizer.state.clear()
    for group in _groups(engine):
        optimizer.state[group] = {key: torch.zeros_like(group, requires_grad=False) for key in keys}
        # torch's own optimizers count in a tensor, DeepSpeed's CPU ones in an int
        is_torch = type(optimizer).__module__.startswith("torch.")
        optimizer.state[group]["step"] = torch.tensor(float(step)) if is_torch else step
    for name, fragment in _fragments(engine, parameters):
        for key in keys:
            whole = moments[f"{key}/{name}"].reshape(-1)
            fragment.of(optimizer.state[fragment.flat][key]).copy_(
                whole.narrow(0, fragment.start, fragment.numel)
            )


def optimizer_tensors(engine: Any) -> Iterator[torch.Tensor]:
    """Yield what this rank's optimizer keeps in memory: masters and moments; where it steps the model's own
    parameters, those too."""
    yield from _groups(engine)
    for entry in _optimizer(engine).state.values():
        yield from (value for value in entry.values() if torch.is_tensor(value))


def forget_warm_start(engine: Any) -> None:
    """Undo the zero-gradient step with which DeepSpeed's stage-0 bf16 and fp16 optimizer allocates its state.

    That step counts in Adam's bias correction and applies weight decay once before training
    (``unfused_optimizer.py``, ``initialize_optimizer_states``), so stage 0 would follow another curve than
    the stages that do without it.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups"):
        for masters, computed in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, parameter in zip(masters, computed, strict=True):
                master.data.copy_(parameter)
        wrapper.optimizer.state.clear()


def _optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.basic_optimizer


def _groups(engine: Any) -> list[torch.Tensor]:
    """Return the tensors that the optimizer steps on this rank."""
    wrapper = engine.optimizer
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(wrapper, attribute):
            return list(getattr(wrapper, attribute))
    return [parameter for group in wrapper.param_groups for parameter in group["params"]]


def _moment_keys(engine: Any) -> list[str]:
    entries = _optimizer(engine).state.values()
    return sorted(
        {
            key
            for entry in entries
            for key, value in entry.items()
            if torch.is_tensor(value) and value.dim() > 0
        }
    )


def _fragments(engine: Any, parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, Fragment]]:
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        find = _stage3_fragment
    elif hasattr(wrapper, "single_partition_of_fp32_groups"):
        find = _stage12_fragment
    elif hasattr(wrapper, "fp32_groups"):
        find = _listed_fragment
    else:
        find = _plain_fragment
    for name, parameter in parameters.items():
        fragment = find(wrapper, parameter)
        if fragment is not None:
            yield name, fragment


def _plain_fragment(_wrapper: Any, parameter: nn.Parameter) -> Fragment:
    return Fragment(start=0, flat=parameter, offset=0, numel=parameter.numel())


def _listed_fragment(wrapper: Any, parameter: nn.Parameter) -> Fragment:
    for computed, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for low, master in zip(computed, masters, strict=True):
            if low is parameter:
                return Fragment(start=0, flat=master, offset=0, numel=parameter.numel())
    raise AssertionError("a trainable parameter is in no parameter group")


def _stage12_fragment(wrapper: Any, parameter: nn.Parameter) -> Fragment | None:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # the parameter lies in another rank's slice
        return None
    return Fragment(
        start=mapping.lp_fragment_address.start,
        flat=wrapper.single_partition_of_fp32_groups[mapping.param_group_index],
        offset=mapping.hp_fragment_address.start,
        numel=mapping.hp_fragment_address.numel,
    )


def _stage3_fragment(wrapper: Any, parameter: nn.Parameter) -> Fragment | None:
    group, offset, numel = wrapper.grad_position[wrapper.get_param_id(parameter)]
    start = rank() * numel  # every rank's slice has the same, rounded-up length
    numel = min(numel, parameter.ds_numel - start)  # type: ignore[attr-defined]
    if numel <= 0:
        return None
    return Fragment(start=start, flat=wrapper.fp32_partitioned_groups_flat[group], offset=offset, numel=numel)


def _gather(parameter: nn.Parameter, fragment: Fragment | None, part: Any) -> torch.Tensor:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    whole = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
    # Stage 0 holds every parameter whole on every rank: one rank contributes, or the sum would count it once
    # per rank.
    is_replica = fragment is not None and fragment.numel == whole.numel() and not _is_sliced(parameter)
    if fragment is not None and (not is_replica or rank() == 0 or world_size() == 1):
        whole.view(-1).narrow(0, fragment.start, fragment.numel).copy_(part(fragment))
    return all_reduce_sum(whole).cpu()


def _is_sliced(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _set_compute_copy(parameter: nn.Parameter, master: torch.Tensor) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(master)
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        if rank() == 0:
            parameter.data.copy_(master)
