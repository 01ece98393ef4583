"""The two exports: ``merged``, a model for ``transformers``, and ``native``, the adapter alone.

The order of ``merged``: the adapted model computes its logits, which also finds every mistake in its files;
then the base's tensors stream through the fold into their shards; then the folder is opened as its users will
open it, and compared. Only a folder that agrees gets its name.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from sparse_llama.adapters.weights import AdapterFile, load_adapter, save_adapter
from sparse_llama.errors import ExportError
from sparse_llama.export.agreement import Errors, Reference, make_reference
from sparse_llama.export.merged import MergedModel, merged_tensors, plan_merge, sparse_ones
from sparse_llama.export.publish import check_output, find_adapter, publishing
from sparse_llama.export.shards import MAX_SHARD_BYTES, ShardWriter
from sparse_llama.export.tokenizer_files import write_tokenizer
from sparse_llama.layouts import Layout
from sparse_llama.model.assemble import MODELLING_CODE, plan_of_adapter
from sparse_llama.model.files import resolve_model
from sparse_llama.model.llama import read_config

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    needs_code: bool
    """Whether ``trust_remote_code=True`` opens it."""
    dtype: torch.dtype
    num_tokens: int
    """Tokens of the comparison with the adapted model."""
    errors: Errors
    limits: Errors

    @property
    def opens_with(self) -> str:
        """The line of Python that opens it."""
        code = ", trust_remote_code=True" if self.needs_code else ""
        return f'AutoModelForCausalLM.from_pretrained("{self.folder}"{code})'

    def rows(self) -> list[tuple[str, str]]:
        """Return what a user has to know: where it is, and how near it is."""
        return [
            ("folder", str(self.folder)),
            ("weights", str(self.dtype).removeprefix("torch.")),
            ("compared over", f"{self.num_tokens} tokens, with the adapted model in fp32"),
            ("relative error", str(self.errors)),
            ("allowed", str(self.limits)),
        ]


def export_merged(
    checkpoint: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    model: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Write base and adapter as one model that ``AutoModelForCausalLM.from_pretrained(output)`` opens.

    Args:
        checkpoint: a run's folder, an adapter folder or a checkpoint.
        dtype: of the weights; None is what the run computed in.
        model: hub id or folder of the base; None is the one that the adapter names.

    Raises:
        CheckpointError: there is no adapter, or it is of another base.
        ModelError: the base is missing or incomplete.
        ExportError: the output holds something else, or the export would not compute what the adapted model
            does. Nothing is published then.
    """
    adapter = find_adapter(checkpoint)
    file, tensors = load_adapter(adapter)
    name, revision = (model, None) if model else (file.base_model.path, file.base_model.revision)
    folder = resolve_model(name, revision)
    check_output(output, overwrite=overwrite, sources=(adapter, folder))
    config = read_config(folder)
    layouts = _layer_layouts(file, config)
    kept_dtype: torch.dtype = dtype or getattr(torch, file.dtype)
    reference = make_reference(
        str(folder), adapter, revision=None, dtype=kept_dtype, layouts=sparse_ones(layouts)
    )
    merged = plan_merge(config, file.adapter, tensors, layouts)
    with publishing(output) as unfinished:
        write_tokenizer(folder, unfinished)
        _write_model(merged, folder, unfinished, kept_dtype, max_shard_bytes)
        errors = _check(reference, unfinished, merged, kept_dtype)
    return Exported(
        output, merged.needs_code, kept_dtype, reference.tokens.shape[1], errors, reference.limits
    )


def _layer_layouts(file: AdapterFile, config: LlamaConfig) -> list[Layout | None]:
    """Return every layer's layout; those that hide nothing in the run's own length are full attention.

    A layout is as long as the model's longest sequence where its mode can be extended.
    """
    plan = plan_of_adapter(file, config)
    longest = plan.max_tokens()
    num_tokens = min(config.max_position_embeddings, longest or config.max_position_embeddings)
    return [
        plan.layout(layer, max(num_tokens, file.master_length))
        if plan.is_sparse_at(file.master_length)
        else None
        for layer in range(config.num_hidden_layers)
    ]


def export_native(checkpoint: Path, output: Path, *, overwrite: bool = False) -> Path:
    """Write the adapter alone, fp32 masters and configuration, and return its folder.

    Raises:
        CheckpointError: there is no adapter, or it is damaged.
        ExportError: the output holds something else.
    """
    adapter = find_adapter(checkpoint)
    file, tensors = load_adapter(adapter)
    check_output(output, overwrite=overwrite, sources=(adapter,))
    with publishing(output) as unfinished:
        save_adapter(unfinished, tensors, file)
        again, copies = load_adapter(unfinished)
        if again != file or any(not torch.equal(copies[name], tensor) for name, tensor in tensors.items()):
            raise ExportError(f"--output {output}: reads back differently; nothing was written")
    return output


def _write_model(
    merged: MergedModel, base: Path, folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    text = json.dumps(merged.config_json(dtype), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if merged.needs_code:
        shutil.copyfile(MODELLING_CODE, folder / MODELLING_CODE.name)
    if (base / _GENERATION).is_file():
        shutil.copyfile(base / _GENERATION, folder / _GENERATION)
    with ShardWriter(folder, merged.specs(dtype), max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in merged_tensors(merged, base):
            writer.write(name, tensor)


def _check(reference: Reference, folder: Path, merged: MergedModel, dtype: torch.dtype) -> Errors:
    """Return the errors of what was written; a folder that does not open is ours to explain too."""
    try:
        return reference.check(folder, merged, dtype)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"the exported model does not open ({reason}); nothing was written") from error
