"""A LLaMA from its files, strictly: every tensor of the model is in the checkpoint, and every tensor of the
checkpoint in it.

A base that is not loaded trains without an error: its loss falls from 0.9 ln V or more, and its perplexity is
V. So a missing, unexpected or misshapen tensor ends the run here, and ``model/checks.py`` looks at the first
logits and loss.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sparse_llama.config.section import show_plain
from sparse_llama.distributed.ranks import is_main
from sparse_llama.errors import ModelError
from sparse_llama.model.configuration import read_config
from sparse_llama.model.files import checkpoint_tensors, resolve_model

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HARMLESS = (
    "rotary_emb.inv_freq"  # a buffer that older transformers saved; it is computed from the configuration
)


@dataclass(frozen=True)
class LoadedLlama:
    """A base model, the folder it came from, and what the user has to be told about it."""

    model: LlamaForCausalLM
    folder: Path
    notices: tuple[str, ...] = ()


def load_llama(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    config: LlamaConfig | None = None,
    random_weights: bool = False,
    seed: int = 42,
    zero3_config: dict[str, Any] | None = None,
) -> LoadedLlama:
    """Return the LLaMA at ``path`` in ``dtype`` on ``device``, every tensor cast as it is copied from its
    mapped file.

    Args:
        config: of the model, where it turns positions otherwise than its ``config.json`` says.
        random_weights: draw the weights as transformers initialises a new model; only the configuration is
            read.
        zero3_config: DeepSpeed's configuration at ZeRO stage 3. The model is then made in partitions: rank 0
            reads each tensor and every rank keeps its part, so no process holds the model whole.

    Raises:
        ModelError: not a LLaMA, or the checkpoint and the model do not have the same tensors.
    """
    folder = resolve_model(path, revision)
    config = read_config(folder) if config is None else config
    if not random_weights:
        _check(config, _tensors_of(config, folder), source=folder)
    model = _construct(config, dtype=dtype, device=torch.device(device), zero3_config=zero3_config)
    if random_weights:
        _fill(model, _random_tensors(model, seed))
        notice = (
            f"{path}: RANDOM weights, seed {seed} (sparse_llama.model.random_weights); "
            "the checks of the base are off"
        )
        return LoadedLlama(model, folder, (*_code_notice(config, folder), notice))
    _fill(model, _tensors_of(config, folder))
    return LoadedLlama(model, folder, _code_notice(config, folder))


def _code_notice(config: LlamaConfig, folder: Path) -> tuple[str, ...]:
    """Return what to say of a LLaMA that brings code of its own, as some do for a faster attention."""
    if not getattr(config, "auto_map", None):
        return ()
    return (
        f"{folder}: brings modelling code (auto_map in config.json), which is not run; it is opened as "
        "transformers' LLaMA",
    )


def _construct(
    config: LlamaConfig, *, dtype: torch.dtype, device: torch.device, zero3_config: dict[str, Any] | None
) -> LlamaForCausalLM:
    """Return the model with parameters that have a place but no values yet."""
    making: AbstractContextManager[Any] = (
        torch.device("meta") if zero3_config is None else _partitioning(zero3_config, dtype)
    )
    with making:
        model: Any = LlamaForCausalLM(config)  # transformers' wrapped ``to`` confuses type checkers
    if zero3_config is None:
        model.to(dtype)
        model.to_empty(device=device)
        model.tie_weights()  # leaving the meta device makes new parameters, and two of a tied one
    # Made again outside: on the meta device it has no values, and in zero.Init its frequencies would be cast
    # to bf16, which turns positions by up to 0.4%: 4 radians at token 1,000.
    model.model.rotary_emb = LlamaRotaryEmbedding(config=config).to(device)
    return model.eval()


def _partitioning(zero3_config: dict[str, Any], dtype: torch.dtype) -> AbstractContextManager[Any]:
    import deepspeed  # takes 2 s, and only stage 3 needs it

    # Its own ``dtype`` argument turns fp32 into bf16 on devices without fp16 (DeepSpeed 0.19.8,
    # ``_set_dtype``: the conditional binds looser than ``or``); the configuration's precision is honoured.
    context = deepspeed.zero.Init(config_dict_or_path=zero3_config)
    assert context.dtype == dtype, (
        f"the DeepSpeed configuration computes in {context.dtype}, the run in {dtype}"
    )
    return context


def _check(config: LlamaConfig, tensors: Iterator[tuple[str, torch.Tensor]], *, source: Path) -> None:
    """Refuse a checkpoint whose tensors are not those of the model, before the model takes any memory; the
    tensors are mapped, so that no weight is read for it.

    Raises:
        ModelError: one is missing, unknown, given twice, of another shape or of no floating-point type.
    """
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}  # a tied weight once
    wanted = set(shapes)
    unexpected: list[str] = []
    for name, tensor in tensors:
        if name not in shapes:
            unexpected.append(name)
            continue
        if name not in wanted:
            raise ModelError(f"{source}: {name} is in two shards; download the checkpoint again")
        wanted.remove(name)
        if tensor.shape != shapes[name]:
            raise ModelError(
                f"{source}: {name} has shape {list(tensor.shape)}, config.json says {list(shapes[name])}; "
                "they are of two models"
            )
        if tensor.dtype not in _FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{source}: {name} is {dtype}; a base's weights are bfloat16, float16 or float32: give the "
                "model that it was made from"
            )
    missing = sorted(wanted)
    if missing or unexpected:
        found = [
            f"{len(names)} tensors {word} (first {show_plain(names[0])})"
            for names, word in ((missing, "missing"), (unexpected, "unexpected"))
            if names
        ]
        raise ModelError(
            f"{source}: {' and '.join(found)}; the checkpoint is not of the model in config.json "
            "(is it an adapter, a renamed or a partial checkpoint?)"
        )


@torch.no_grad()
def _fill(model: nn.Module, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Copy ``tensors``, which are all of the model's, into its parameters."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        parameter = parameters[name]
        with _whole(parameter):
            if not hasattr(parameter, "ds_id") or is_main():
                parameter.copy_(tensor)


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Return the context in which a ZeRO-3 parameter is whole, and after which rank 0's values are
    everyone's."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0)


def _tensors_of(config: LlamaConfig, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the checkpoint's tensors, without rotary frequencies and without the head of a model whose
    embedding is its head."""
    tied: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint_tensors(folder):
        if config.tie_word_embeddings and name in (_EMBEDDING, _HEAD):
            tied[name] = tensor
        is_tied_head = config.tie_word_embeddings and name == _HEAD
        if not is_tied_head and not name.endswith(_HARMLESS):
            yield name, tensor
    if len(tied) == 2 and not torch.equal(tied[_EMBEDDING], tied[_HEAD]):
        raise ModelError(
            f"{folder}: config.json says tie_word_embeddings, but {_HEAD} differs from {_EMBEDDING}; "
            'set "tie_word_embeddings": false to use both'
        )


def _random_tensors(model: LlamaForCausalLM, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a new model's weights: matrices normal with ``initializer_range``, norms one, biases zero, as
    transformers'.

    One generator in the model's order, so that every rank, ZeRO stage and device has the same.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if name.endswith(".bias"):
            yield name, torch.zeros(shape)
        elif len(shape) == 1:
            yield name, torch.ones(shape)
        else:
            yield name, torch.empty(shape).normal_(0.0, model.config.initializer_range, generator=generator)
