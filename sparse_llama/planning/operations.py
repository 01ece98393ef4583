"""Operations on meta tensors, whose results are known from the last time they had such arguments.

A loop over tiles asks for the same few dozen results thousands of times. PyTorch works out many operations'
shapes in Python, in some 100 us; to look one up takes 5.
"""

from typing import Any, NamedTuple

import torch

_RESHAPING = {"resize_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_", "detach_"}


class _Form(NamedTuple):
    """What it takes to make a result again."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Results(NamedTuple):
    forms: tuple[_Form | None, ...]
    is_tuple: bool


class Operations:
    """Runs operations on meta tensors."""

    def __init__(self) -> None:
        self._classes: dict[Any, tuple[bool, bool]] = {}
        self._results: dict[Any, _Results | None] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what ``func`` returns: new tensors are new memory, views are of their base."""
        classes = self._classes.get(func)
        if classes is None:
            classes = self._classes[func] = _classify(func)
        makes_new, writes_first = classes
        if writes_first:
            return args[0]
        if not makes_new:
            return func(*args, **kwargs)
        key = func, _describe(args), _describe(kwargs.items()) if kwargs else None
        if key not in self._results:
            out = func(*args, **kwargs)
            self._results[key] = _results_of(out)
            return out
        known = self._results[key]
        if known is None:
            return func(*args, **kwargs)
        made = tuple(None if form is None else _make(form) for form in known.forms)
        return made if known.is_tuple else made[0]


def _classify(func: Any) -> tuple[bool, bool]:
    """Return whether ``func`` returns new memory only, and whether it returns its first argument, written
    to."""
    schema = func._schema
    aliases = [argument.alias_info for argument in schema.arguments]
    written = [index for index, alias in enumerate(aliases) if alias is not None and alias.is_write]
    makes_new = all(alias is None for alias in (*aliases, *(one.alias_info for one in schema.returns)))
    name = schema.name.rpartition("::")[2]
    return makes_new, written == [0] and name.endswith("_") and name not in _RESHAPING


def _describe(values: Any) -> tuple[Any, ...]:
    """Return what a result's shape, strides and type can depend on."""
    described: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            described.append((value.shape, value.stride(), value.dtype, value.is_meta))
        elif type(value) in (list, tuple):
            described.append(_describe(value))
        else:
            described.append((type(value), value))  # 1 and 1.0 are equal, and give other types
    return tuple(described)


def _results_of(out: Any) -> _Results | None:
    """Return what it takes to make ``out`` again; None where that is more than memory on ``meta``."""
    values = out if isinstance(out, tuple) else (out,)
    if not all(one is None or (isinstance(one, torch.Tensor) and one.is_meta) for one in values):
        return None
    forms = (None if one is None else _Form(tuple(one.shape), one.stride(), one.dtype) for one in values)
    return _Results(tuple(forms), isinstance(out, tuple))


def _make(form: _Form) -> torch.Tensor:
    return torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device="meta")
