"""The exports for other programs: PEFT's, lit-llama's, litgpt's and the original LLaMA-Adapter's own files.

What a format cannot hold is refused with the reason, never approximated. What was written is read back, and
has to be the same adapter: every tensor to the bit, and the gates as far as a tanh and its inverse are exact
in fp32 where the format has one and the adapter has none, or the other way round.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_llama.adapters.interop import ForeignAdapter, read_foreign, write_foreign
from sparse_llama.adapters.merge import head_gates
from sparse_llama.errors import ExportError
from sparse_llama.export.agreement import adapted_loss
from sparse_llama.export.left_out import Part, check_asked, find_parts
from sparse_llama.export.publish import check_output, publishing
from sparse_llama.export.source import Source, find_source
from sparse_llama.export.validation import Losses, read_for

_OPENED_BY = {
    "peft": 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")',
    "lit-llama": "python generate/{script}.py --adapter_path {file}",
    "litgpt": "litgpt generate_{script} CHECKPOINT_DIR --adapter_path {file}",
    "llama-adapter": "torchrun example.py --ckpt_dir DIR --tokenizer_path FILE --adapter_path {file}",
}
_MULTIMODAL = 'llama.load("{file}", LLAMA_DIR)'  # in llama_adapter_v2_multimodal7b
_GATE_LIMIT = 1e-6  # relative: of fp32's tanh and atanh
_NEUTRAL = {"adapter_scale": 1.0, "adapter_bias": 0.0}  # what a format may add or leave out


@dataclass(frozen=True)
class ForeignExport:
    """What was written."""

    folder: Path
    format: str
    opens_with: str
    """The line that opens it: of Python for PEFT, of a shell for the others."""
    losses: Losses | None
    notices: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Return what a user has to know."""
        files = ", ".join(path.name for path in sorted(self.folder.iterdir()))
        return [
            ("folder", str(self.folder)),
            ("format", self.format),
            ("files", f"{files}; read back, the same adapter"),
            *([] if self.losses is None else self.losses.rows()),
            *(("note", notice) for notice in self.notices),
        ]


def export_foreign(
    format: str,
    checkpoint: Path,
    output: Path,
    *,
    model: str | None = None,
    dense_attention: bool = False,
    data: str | None = None,
    overwrite: bool = False,
) -> ForeignExport:
    """Write the adapter in ``checkpoint`` as the files of another program, which are read back and compared.

    Args:
        format: one of ``interop.FOREIGN``.
        model: hub id or folder of the base; None is the one that the adapter names.
        dense_attention: leave out the sparse layout that the adapter was trained with; the loss under both
            is measured.
        data: to measure that on; None is the run's own validation data.

    Raises:
        CheckpointError: there is no adapter, or it is of another base.
        ConfigError, DataError: there are no data to measure a loss on.
        ModelError: the base is missing or incomplete.
        ExportError: the output holds something else, or the format cannot hold the adapter.
    """
    source = find_source(checkpoint, model)
    check_output(output, overwrite=overwrite, sources=(source.adapter, source.base))
    asked: frozenset[Part] = frozenset({"layout"} if dense_attention else set())
    found = find_parts(source.tensors, source.layouts)
    notices = source.notices + check_asked(asked, found, source.file)
    if "layout" in found and not dense_attention:
        raise ExportError(
            f"--format {format}: has no word for the layout that the adapter was trained with "
            f"({source.file.layouts}), which is a part of the model; leave it out with --dense_attention, or "
            "use --format merged or native"
        )
    if (rope := source.file.rope_parameters) is not None:
        raise ExportError(
            f"--format {format}: has no word for the positions that the adapter was trained with ({rope}), "
            "and its program would turn them as the base does; use --format merged or native"
        )
    held_out = read_for(source, found & asked, asked=asked, data=data)
    with publishing(output) as unfinished:
        notices += write_foreign(
            format,
            unfinished,
            source.file.adapter,
            source.tensors,
            source.config,
            base_model=source.model,
        )
        _compare(format, source, read_foreign(unfinished, source.config))
        losses = None
        if held_out is not None:
            dtype: torch.dtype = getattr(torch, source.file.dtype)
            trained, exported = (
                adapted_loss(source.base, source.adapter, left_out, dtype, held_out)
                for left_out in (frozenset(), found & asked)
            )
            losses = Losses(held_out.source, held_out.num_labelled, trained, exported)
    return ForeignExport(output, format, _opens_with(format, source, output), losses, notices)


def _opens_with(format: str, source: Source, folder: Path) -> str:
    script = "adapter" if source.file.adapter.version == "v1" else "adapter_v2"
    file = min(folder.iterdir())
    is_multimodal = format == "llama-adapter" and source.file.adapter.version == "v2"
    return (_MULTIMODAL if is_multimodal else _OPENED_BY[format]).format(
        base=source.model, folder=folder, file=file, script=script
    )


def _compare(format: str, source: Source, read: ForeignAdapter) -> None:
    """Raise ExportError unless what was ``read`` back computes what the adapter does."""
    ours, theirs = source.tensors, read.tensors
    for name in sorted(ours.keys() | theirs.keys()):
        if name.endswith(".gate") and name in ours and name in theirs:
            agrees = _gates_agree(source, read, name)
        elif name in ours and name in theirs:
            agrees = torch.equal(ours[name], theirs[name])
        else:
            one = ours[name] if name in ours else theirs[name]
            agrees = bool((one == _NEUTRAL.get(name.rpartition(".")[2], float("nan"))).all())
        if not agrees:
            raise ExportError(f"--format {format}: {name} reads back differently; nothing was written")


def _gates_agree(source: Source, read: ForeignAdapter, name: str) -> bool:
    settings, num_heads = source.file.adapter, source.config.num_attention_heads
    ours, theirs = (
        head_gates(tensors[name], num_heads, is_tanh=its.gate_activation == "tanh")
        for tensors, its in ((source.tensors, settings), (read.tensors, read.settings))
    )
    if settings.gate_activation == read.settings.gate_activation:
        return torch.equal(ours, theirs)
    return torch.allclose(ours, theirs, rtol=_GATE_LIMIT, atol=0)
