"""The exports of our own: ``merged``, a model for ``transformers``, and ``native``, the adapter alone.

The order of ``merged``: the adapted model computes its logits, which also finds every mistake in its files;
then the base's tensors stream through the fold into their shards; then the folder is opened as its users will
open it, in a process of its own, and compared. Only a folder that agrees gets its name.
"""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_llama.adapters.weights import is_native, read_adapter_folder, write_adapter_folder
from sparse_llama.config.settings import TemplateName
from sparse_llama.errors import ExportError
from sparse_llama.export.agreement import Errors, adapted_loss, make_reference
from sparse_llama.export.left_out import Part, Parts, check_asked, describe, find_parts, flags_of
from sparse_llama.export.merged import MergedModel, merged_tensors, plan_merge
from sparse_llama.export.publish import check_output, publishing
from sparse_llama.export.shards import MAX_SHARD_BYTES, ShardWriter
from sparse_llama.export.source import find_source, locate
from sparse_llama.export.tokenizer_files import write_tokenizer
from sparse_llama.export.validation import Losses, read_for
from sparse_llama.model.assemble import MODELLING_CODE, TEMPLATE_KEY

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    needs_code_for: Parts
    """What plain LLaMA cannot hold, so that ``trust_remote_code=True`` opens it; empty is a plain LLaMA."""
    left_out: Parts
    could_leave_out: bool
    """Whether flags would have made it plain: not where nothing of the adapter would be left."""
    losses: Losses | None
    """With and without what was left out."""
    dtype: torch.dtype
    num_tokens: int
    """Tokens of the comparison with the adapted model."""
    density: float
    """Of the token pairs that the sparsest layout attends over in them."""
    errors: Errors
    limits: Errors
    notices: tuple[str, ...] = ()

    @property
    def needs_code(self) -> bool:
        return bool(self.needs_code_for)

    @property
    def opens_with(self) -> str:
        """The line of Python that opens it."""
        code = ", trust_remote_code=True" if self.needs_code else ""
        return f'AutoModelForCausalLM.from_pretrained("{self.folder}"{code})'

    def rows(self) -> list[tuple[str, str]]:
        """Return what a user has to know: where it is, what it is, and how near it is."""
        code = "none, a plain LlamaForCausalLM"
        if self.needs_code:
            code = f"for {describe(self.needs_code_for)}"
            if self.could_leave_out:
                code += f"; none with {' '.join(flags_of(self.needs_code_for))}"
        over = f"{self.num_tokens} tokens"
        if self.density < 1:
            over += f" (density {self.density:.2f})"
        without = "" if not self.left_out else f" without {describe(self.left_out)}"
        return [
            ("folder", str(self.folder)),
            ("weights", str(self.dtype).removeprefix("torch.")),
            ("modelling code", code),
            *([] if self.losses is None else self.losses.rows()),
            ("compared over", f"{over}, with the adapted model{without} in fp32"),
            ("opened in", "a process of its own, with plain transformers"),
            ("relative error", str(self.errors)),
            ("allowed", str(self.limits)),
            *(("note", notice) for notice in self.notices),
        ]


def export_merged(
    checkpoint: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    model: str | None = None,
    leave_out: Collection[Part] = (),
    data: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Write base and adapter as one model that ``AutoModelForCausalLM.from_pretrained(output)`` opens.

    Args:
        checkpoint: a run's folder, an adapter folder or a checkpoint.
        dtype: of the weights; None is what the run computed in.
        model: hub id or folder of the base; None is the one that the adapter names.
        leave_out: parts that plain LLaMA cannot hold; the loss with and without them is measured.
        data: to measure that on; None is the run's own validation data.

    Raises:
        CheckpointError: there is no adapter, or it is of another base.
        ConfigError, DataError: there are no data to measure a loss on.
        ModelError: the base is missing or incomplete.
        ExportError: the output holds something else, or the export would not compute what the adapted model
            does. Nothing is published then.
    """
    source = find_source(checkpoint, model)
    check_output(output, overwrite=overwrite, sources=(source.adapter, source.base))
    found = find_parts(source.tensors, source.layouts)
    notices = source.notices + check_asked(leave_out, found, source.file)
    left_out = found & frozenset(leave_out)
    held_out = read_for(source, left_out, asked=leave_out, data=data)
    kept_dtype: torch.dtype = dtype or getattr(torch, source.file.dtype)
    reference = make_reference(
        source.base,
        source.adapter,
        left_out=left_out,
        dtype=kept_dtype,
        layouts=() if "layout" in left_out else source.layouts,
    )
    merged = plan_merge(source.config, source.file.adapter, source.tensors, source.layer_layouts, left_out)
    assert merged.needs_code == bool(found - left_out)
    trained_loss = None
    if held_out is not None:
        trained_loss = adapted_loss(source.base, source.adapter, frozenset(), kept_dtype, held_out)
    with publishing(output) as unfinished:
        write_tokenizer(source.base, unfinished)
        _write_model(merged, source.base, unfinished, kept_dtype, max_shard_bytes, source.file.template)
        errors, loss = reference.check(unfinished, merged, kept_dtype, held_out)
    losses = None
    if held_out is not None and trained_loss is not None and loss is not None:
        losses = Losses(held_out.source, held_out.num_labelled, trained_loss, loss)
    return Exported(
        folder=output,
        needs_code_for=found - left_out,
        left_out=left_out,
        could_leave_out="prompt" not in found - left_out or source.file.adapter.version != "v1",
        losses=losses,
        dtype=kept_dtype,
        num_tokens=reference.tokens.shape[1],
        density=reference.density,
        errors=errors,
        limits=reference.limits,
        notices=notices,
    )


def export_native(
    checkpoint: Path, output: Path, *, model: str | None = None, overwrite: bool = False
) -> Path:
    """Write the adapter alone, fp32 masters and configuration, and return its folder.

    Args:
        model: hub id or folder of the base that another program's adapter belongs to.

    Raises:
        CheckpointError: there is no adapter, or it is damaged.
        ExportError: the output holds something else.
    """
    adapter = locate(checkpoint)
    if is_native(adapter):
        if model is not None:
            raise ExportError(
                "--model: a native export is the adapter as it is, and it names its base; leave --model out"
            )
        file, tensors = read_adapter_folder(adapter)
    else:
        source = find_source(checkpoint, model)
        file, tensors = source.file, source.tensors
    check_output(output, overwrite=overwrite, sources=(adapter,))
    with publishing(output) as unfinished:
        write_adapter_folder(unfinished, tensors, file)
        again, copies = read_adapter_folder(unfinished)
        if again != file or any(not torch.equal(copies[name], tensor) for name, tensor in tensors.items()):
            raise ExportError(f"--output {output}: reads back differently; nothing was written")
    return output


def _write_model(
    merged: MergedModel,
    base: Path,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    template: TemplateName = "alpaca",
) -> None:
    named = {} if template == "alpaca" else {TEMPLATE_KEY: template}
    text = json.dumps(merged.config_json(dtype) | named, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if merged.needs_code:
        shutil.copyfile(MODELLING_CODE, folder / MODELLING_CODE.name)
    if (base / _GENERATION).is_file():
        shutil.copyfile(base / _GENERATION, folder / _GENERATION)
    with ShardWriter(folder, merged.specs(dtype), max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in merged_tensors(merged, base):
            writer.write(name, tensor)
