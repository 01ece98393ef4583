"""What an engine counts beside its optimizer's updates: the learning rates' schedule and fp16's loss scale.

With fp16 a step whose gradients overflow is skipped: then the schedule stands still and the scale halves, so
neither follows from the number of steps.
"""

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_clocks(engine: Any) -> dict[str, Any]:
    """Return the steps that the schedule has made and the state of a dynamic loss scale, as JSON holds
    them."""
    scaler, scheduler = _scaler(engine), engine.lr_scheduler
    steps = scheduler.last_epoch if _is_ours(scheduler) else scheduler.last_batch_iteration + 1
    return {
        "scheduled_steps": int(steps),
        "loss_scale": {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)},
    }


def write_clocks(engine: Any, clocks: dict[str, Any]) -> None:
    """Put the learning rates and the loss scale where ``clocks`` left them."""
    scaler = _scaler(engine)
    for name, value in clocks["loss_scale"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    _set_schedule(engine.lr_scheduler, clocks["scheduled_steps"])


def _set_schedule(scheduler: Any, step: int) -> None:
    if _is_ours(scheduler):
        rates = [
            base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        state = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        scheduler.load_state_dict(scheduler.state_dict() | state)
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    else:  # DeepSpeed's own take the number of the last finished step, counted from 0
        scheduler.step(step - 1)


def _is_ours(scheduler: Any) -> bool:
    return isinstance(scheduler, LambdaLR)


def _scaler(engine: Any) -> Any:
    """Return what holds the state of a dynamic loss scale; None where the scale is fixed, or there is
    none."""
    for attribute, flag in (("loss_scaler", "dynamic"), ("loss_scale_config", "dynamic_loss_scale")):
        scaler = getattr(engine.optimizer, attribute, None)
        if scaler is not None and getattr(scaler, flag, False):
            return scaler
    return None
