"""An exported folder, opened as its users open it, and measured: the program of a process of its own.

    python -P reopen.py FOLDER JOB.safetensors RESULT.safetensors

Imports torch, transformers and safetensors only, and ends with an error if anything of this package has been
imported: the folder has to do without it. The same functions measure the adapted model, in the exporter.

``T`` tokens, ``V`` vocabulary.
"""

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

_IGNORED = -100
_LOSS_ROWS = 1024  # logits in memory at once while a loss is summed


def measure_folder(
    folder: Path, job: dict[str, torch.Tensor], options: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Return what the model in ``folder`` computes.

    Args:
        job: ``tokens`` (1, T); ``rows``, which of their logits are returned; ``num_decoded`` (); and the
            arguments of ``loss_sum`` if there is a loss to measure.
        options: ``dtype``, ``device`` of the loss, and ``code``, "yes" where the folder's own is run.

    Returns:
        ``logits`` (rows, V) and ``decoded`` (num_decoded, V), fp32; ``loss``, see ``loss_sum``;
        ``rotation``, see there; and the integers that the model holds, which are its layouts, by their names.
    """
    logging.disable_progress_bar()
    dtype = getattr(torch, options["dtype"])
    has_code = options["code"] == "yes"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=has_code).eval()
    found = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_floating_point()
    }
    found["rotation"] = rotation(model)
    found["logits"] = logits_at(model, job["tokens"], job["rows"])
    found["decoded"] = decode(model, job["tokens"], int(job["num_decoded"]))
    if "ids" in job:
        found["loss"] = loss_sum(model.to(options["device"]), job["ids"], job["labels"], job["lengths"])
    return found


def rotation(model: Any) -> torch.Tensor:
    """Return the turn of each pair of channels per position, and what cosine and sine are multiplied by,
    fp32."""
    rotary = model.model.rotary_emb
    return torch.cat([rotary.inv_freq.float(), torch.tensor([float(rotary.attention_scaling)])])


@torch.no_grad()
def logits_at(model: Any, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the fp32 logits of some of the tokens, read in one pass."""
    return model(input_ids=tokens, use_cache=False, logits_to_keep=rows).logits[0].float()


@torch.no_grad()
def decode(model: Any, tokens: torch.Tensor, num_decoded: int) -> torch.Tensor:
    """Return the fp32 logits of the last tokens, one at a time, the last two together, with a cache."""
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = DynamicCache(config=model.config)
    sizes = [tokens.shape[1] - num_decoded, *[1] * (num_decoded - 2), 2]
    parts = [
        model(input_ids=part, use_cache=True, logits_to_keep=part.shape[1] if step else 1, **{named: cache})
        for step, part in enumerate(tokens.split(sizes, dim=1))
    ]
    return torch.cat([part.logits[0].float() for part in parts[1:]])


@torch.no_grad()
def loss_sum(model: Any, ids: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy in nats summed over all labelled tokens, and their number, (2,) fp64.

    Args:
        ids, labels: of documents one after the other; each is read alone. Labels are not shifted, -100 is
            not scored.
        lengths: of the documents.
    """
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64)
    sizes = lengths.tolist()
    for document, its_labels in zip(ids.split(sizes), labels.split(sizes), strict=True):
        targets = its_labels[1:].to(device)
        hidden = model.model(input_ids=document[None].to(device), use_cache=False).last_hidden_state[0, :-1]
        where = (targets != _IGNORED).nonzero()[:, 0]
        for rows in where.split(_LOSS_ROWS):
            logits = model.lm_head(hidden[rows]).float()
            losses = F.cross_entropy(logits, targets[rows], reduction="none")
            total[0] += losses.double().sum().cpu()
        total[1] += len(where)
    return total


def main(folder: str, job_file: str, result_file: str) -> None:
    """Measure ``folder`` as the files say."""
    with safe_open(job_file, "pt") as file:
        options = file.metadata()
    found = measure_folder(Path(folder), load_file(job_file), options)
    strays = [name for name in sys.modules if name.split(".")[0] == "sparse_llama"]
    if strays:
        raise ImportError(f"the folder's code imports {strays[0]}")
    save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
