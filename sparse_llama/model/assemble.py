"""A model ready to train or to use, its parts put together in the one order that is right.

Base, then attention, then adapters, then what saves memory: the adapters take over the attention they find,
tiles and head groups the adapted parts, and checkpointing starts at the lowest layer that the adapters left
to train.
"""

import filecmp
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparse_llama.adapters.attach import attach_adapters, first_trained_layer
from sparse_llama.adapters.rotation import same_rotation, with_rotation
from sparse_llama.adapters.stored import (
    LoadedAdapter,
    base_of_adapter,
    find_adapter,
    plan_of_adapter,
    read_adapter,
)
from sparse_llama.adapters.weights import AdapterFile, BaseModelReference, apply_adapter, is_native
from sparse_llama.attention.interface import AttentionPlan, attach_attention, plan_attention
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.config.layers import LayerSparsities
from sparse_llama.config.rope import FixedRopeParameters
from sparse_llama.config.settings import AdapterSettings, MemorySettings, Settings, TemplateName
from sparse_llama.data.template import with_template
from sparse_llama.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from sparse_llama.distributed.sequence import SequenceParallel
from sparse_llama.errors import CheckpointError, ConfigError, ModelError
from sparse_llama.memory.checkpointing import checkpoint_layers
from sparse_llama.memory.head_groups import group_heads
from sparse_llama.memory.tiles import tile_layers
from sparse_llama.model.configuration import read_config, read_config_json
from sparse_llama.model.files import resolve_model
from sparse_llama.model.llama import load_llama
from sparse_llama.model.rope import Positions, describe_positions, run_positions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the word of a run's precision."""
TEMPLATE_KEY = "prompt_template"
"""In an export's ``config.json``, where it was not ``alpaca``."""
MODELLING_CODE = Path(__file__).parent / "exported" / "modeling_sparse_llama.py"


@dataclass(frozen=True)
class Assembled:
    """A model ready to train."""

    model: LlamaForCausalLM
    plan: AttentionPlan
    adapter: AdapterSettings
    """The variant: the run's, or that of the adapter it trains on from."""
    start: dict[str, torch.Tensor] | None
    """The tensors of that adapter, which the engine has yet to be given."""
    folder: Path
    """Of the base, where its tokenizer is too."""
    rope_parameters: FixedRopeParameters | None
    """The rotary settings in place of the base's; None is the base's own."""
    notices: tuple[str, ...]
    """What the user has to be told, such as random weights."""


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to use: a base, a base with its adapter, or an export."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    adapter_file: AdapterFile | None
    description: str
    folder: Path
    plan: AttentionPlan | None
    """None where an export brings its own attention."""
    notices: tuple[str, ...] = ()
    """What the user has to be told of another program's adapter."""
    template: TemplateName = "alpaca"
    """What stood around questions and answers in training."""

    @cached_property
    def templated(self) -> Tokenizer:
        """The tokenizer for records and instructions; ``tokenizer`` is for text as it stands."""
        return with_template(self.tokenizer, self.folder, self.template)


def assemble(
    settings: Settings,
    layouts: LayerSparsities,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    checkpointing: ActivationCheckpointing | None = None,
    zero3_config: dict[str, Any] | None = None,
    sequence: SequenceParallel | None = None,
) -> Assembled:
    """Return the adapted model of a run, untrained; see ``load_llama`` for ``zero3_config`` and what is
    raised.

    Args:
        sequence: the ranks that share each row.
    """
    base = read_config(resolve_model(settings.model.path, settings.model.revision))
    positions = run_positions(base, settings)
    stored = None
    if settings.training.init_adapter is not None:  # a small file: what is wrong with it is known at once
        stored = _read_start(settings, base, positions, layouts)
    loaded = load_llama(
        settings.model.path,
        dtype=dtype,
        device=device,
        revision=settings.model.revision,
        config=positions.config,
        random_weights=settings.model.random_weights,
        seed=settings.seed,
        zero3_config=zero3_config,
    )
    plan = plan_of_run(settings, layouts, loaded.model.config, sequence=sequence)
    adapter, start, notices = settings.adapter, None, (*loaded.notices, *positions.notices)
    if stored is not None:
        adapter, start, notices = stored.file.adapter, stored.tensors, (*notices, *stored.notices)
    said = add_parts(
        loaded.model, plan, adapter, settings.memory, checkpointing, seed=settings.seed, dtype=dtype
    )
    rope = positions.rope_parameters
    return Assembled(loaded.model, plan, adapter, start, loaded.folder, rope, (*notices, *said))


def plan_of_run(
    settings: Settings,
    layouts: LayerSparsities,
    config: LlamaConfig,
    *,
    num_tokens: int | None = None,
    sequence: SequenceParallel | None = None,
) -> AttentionPlan:
    """Return which layer of a run's model attends by which layout.

    Args:
        num_tokens: of the longest document; None is the run's ``seq_length``.
        sequence: the ranks that share each row.
    """
    return plan_attention(
        layouts.resolve(config.num_hidden_layers),
        num_heads=config.num_attention_heads,
        master_length=max(settings.attention.master_length or 0, num_tokens or settings.seq_length),
        seed=settings.seed,
        backend=settings.attention.backend,
        sequence=sequence,
    )


def add_parts(
    model: LlamaForCausalLM,
    plan: AttentionPlan,
    adapter: AdapterSettings,
    memory: MemorySettings,
    checkpointing: ActivationCheckpointing | None,
    *,
    seed: int,
    dtype: torch.dtype,
) -> tuple[str, ...]:
    """Put everything onto a base that a run of it trains with; return what the user has to be told."""
    attach_attention(model, plan)
    attach_adapters(model, adapter, seed=seed, dtype=dtype)
    tile_layers(model, memory)
    group_heads(model, memory)
    return checkpoint_layers(
        model, checkpointing, first_trained_layer(model), nvme_path=memory.checkpoint_nvme_path
    )


def open_model(
    model: str | None,
    adapter: Path | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    dense_attention: bool = False,
    template: TemplateName | None = None,
) -> OpenedModel:
    """Return a base, a base with an adapter, or an exported folder, with its tokenizer, in evaluation mode.

    Args:
        model: hub id, folder or ``bundled:NAME``; None is the base that the adapter names.
        dtype: None is what the adapter's run computed in; without an adapter, what the model's config.json
            names.
        dense_attention: full attention whatever the adapter was trained with, which is another function.
        template: of instructions; None is the one that the adapter or the export was trained with.

    Raises:
        ConfigError: ``dense_attention`` of what is dense anyhow, or of an export; another ``template`` than
            that of training.
        ModelError: there is no such model, or it brings code that is not ours and ``trust_remote_code`` is
            off.
        CheckpointError: the adapter is damaged or belongs to another base.
    """
    if adapter is not None:
        opened = _open_adapted(
            model, adapter, revision=revision, dtype=dtype, device=device, dense_attention=dense_attention
        )
        # another program's adapter does not say what it was trained with
        is_known = is_native(find_adapter(adapter))
        return _with_template(opened, template, trained=opened.template if is_known else None)
    if dense_attention:
        raise ConfigError("--dense_attention: only an adapter (--adapter) has a layout to leave out")
    if model is None:
        raise ModelError("no model to open; give --model, --adapter, or both")
    folder = resolve_model(model, revision)
    document = read_config_json(folder)
    dtype = dtype or _named_dtype(document)
    trained = document.get(TEMPLATE_KEY)
    if document.get("auto_map"):
        opened = _open_with_code(
            model, folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        return _with_template(opened, template, trained=trained)
    tokenizer = _fitting_tokenizer(folder, read_config(folder))
    llama = load_llama(str(folder), dtype=dtype, device=device).model
    plan = AttentionPlan((None,) * llama.config.num_hidden_layers)
    attach_attention(llama, plan)
    llama.requires_grad_(False)
    opened = OpenedModel(llama, tokenizer, None, model, folder, plan)
    return _with_template(opened, template, trained=trained)


def _with_template(
    opened: OpenedModel, template: TemplateName | None, *, trained: TemplateName | None
) -> OpenedModel:
    """Return ``opened`` with the template that is asked for, or that it was ``trained`` with."""
    if template is not None and trained is not None and template != trained:
        raise ConfigError(
            f"--template {template}: {opened.description} was trained with template {trained}; leave it out"
        )
    return replace(opened, template=template or trained or "alpaca")


def is_own_modelling_code(folder: Path) -> bool:
    """Return whether the code in ``folder`` is byte for byte what this version ships, and nothing else."""
    if not MODELLING_CODE.is_file():
        return False
    auto_map = read_config_json(folder).get("auto_map", {})
    if not isinstance(auto_map, dict):
        return False
    if any(str(reference).split(".", 1)[0] != MODELLING_CODE.stem for reference in auto_map.values()):
        return False  # another module, or another repository's ("owner/name--module.Class")
    code = sorted(folder.rglob("*.py"))
    return code == [folder / MODELLING_CODE.name] and filecmp.cmp(code[0], MODELLING_CODE, shallow=False)


def _read_start(
    settings: Settings, base_config: LlamaConfig, positions: Positions, layouts: LayerSparsities
) -> LoadedAdapter:
    """Return the adapter that a run trains on from; that it attended or turned positions otherwise is a
    notice."""
    path = Path(settings.training.init_adapter or "")
    base = BaseModelReference(path=settings.model.path, revision=settings.model.revision)
    try:
        stored = read_adapter(find_adapter(path), positions.config, base_model=base)
    except CheckpointError as error:
        raise CheckpointError(f"sparse_llama.training.init_adapter: {error}") from error
    file, notices = stored.file, list(stored.notices)
    if file.layouts.distinct != layouts.distinct:
        notices.append(f"{path}: was trained with {file.layouts} attention, this run attends {layouts}")
    if stored.format == "native" and file.template != settings.data.template:
        notices.append(
            f"{path}: was trained with template {file.template}, this run writes {settings.data.template}"
        )
    its_config = with_rotation(base_config, file.rope_parameters, file.seq_length)
    if not same_rotation(its_config, positions.config):
        notices.append(
            f"{path}: was trained with {describe_positions(file.rope_parameters)}, this run has "
            f"{describe_positions(positions.rope_parameters)}"
        )
    return replace(stored, notices=tuple(notices))


def _open_adapted(
    model: str | None,
    adapter: Path,
    *,
    revision: str | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    dense_attention: bool,
) -> OpenedModel:
    source = find_adapter(adapter)
    named = base_of_adapter(source)
    if model is None and named is None:
        raise ModelError(f"{adapter}: this adapter does not name its base; give it with --model")
    base = BaseModelReference(path=model, revision=revision) if model is not None else named
    assert base is not None
    folder = resolve_model(base.path, base.revision)
    config = read_config(folder)
    stored = read_adapter(source, config, base_model=base)
    file, computed_in = stored.file, dtype or getattr(torch, stored.file.dtype)
    config = with_rotation(config, file.rope_parameters, file.seq_length)
    tokenizer = _fitting_tokenizer(folder, config)
    loaded = load_llama(str(folder), dtype=computed_in, device=device, config=config)
    plan = plan_of_adapter(file, loaded.model.config)
    if dense_attention:
        if not plan.masters:
            raise ConfigError(f"--dense_attention: {adapter} was trained with dense attention; leave it out")
        plan = AttentionPlan((None,) * len(plan.layers))
    attach_attention(loaded.model, plan)
    attach_adapters(loaded.model, file.adapter, seed=file.seed)
    apply_adapter(loaded.model, stored.tensors, source=str(adapter))
    loaded.model.eval()
    description = f"{base.path} + {adapter}"
    return OpenedModel(
        loaded.model,
        tokenizer,
        file,
        description,
        folder,
        plan,
        (*loaded.notices, *stored.notices),
        file.template,
    )


def _fitting_tokenizer(folder: Path, config: LlamaConfig) -> Tokenizer:
    """Return a base's tokenizer, every id of which the base has an embedding for."""
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size)
    return tokenizer


def _open_with_code(
    model: str, folder: Path, *, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool
) -> OpenedModel:
    kind: Any
    if is_own_modelling_code(folder):
        # The same bytes from this package: nothing in the folder is run.
        from sparse_llama.model.exported.modeling_sparse_llama import SparseLlamaForCausalLM

        kind, arguments = SparseLlamaForCausalLM, {}
    elif trust_remote_code:
        from transformers import AutoModelForCausalLM

        kind, arguments = AutoModelForCausalLM, {"trust_remote_code": True}
    else:
        raise ModelError(
            f"{model}: brings modelling code (auto_map in config.json) that is not what this version of "
            "sparse-llama ships; read it, then allow it with --trust_remote_code"
        )
    try:
        opened, found = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **arguments)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder}: does not open ({reason}); export it again") from error
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[name]:
            raise ModelError(
                f"{folder}: {len(found[name])} {name.removesuffix('_keys')} tensors (first "
                f"{sorted(map(str, found[name]))[0]}); the files are not of one export, make it again"
            )
    opened.to(device).eval().requires_grad_(False)
    return OpenedModel(opened, load_tokenizer(folder), None, f"{model} (exported)", folder, None)


def _named_dtype(document: dict[str, Any]) -> torch.dtype:
    name = document.get("dtype") or document.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"config.json: dtype is {name!r}; expected float32, bfloat16 or float16")
    return dtype
