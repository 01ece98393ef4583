"""Adapters under transformers' own Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import tokens
from transformers import Trainer, TrainingArguments

from sparse_llama.adapters import AdapterConfig, attach_adapters, load_adapter, save_adapter
from sparse_llama.adapters.attach import trainable_parameters

LENGTHS = (9, 6, 8, 9)


def records() -> list[dict[str, Any]]:
    """Rows of several lengths, padded at the end, as data collators make them."""
    rows = []
    for row, length in zip(tokens(num_rows=4), LENGTHS, strict=True):
        mask = (torch.arange(9) < length).long()
        rows.append({"input_ids": row * mask, "attention_mask": mask, "labels": row.where(mask > 0, -100)})
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_trainer_moves_every_tensor_of_the_adapter_and_nothing_else(
    tiny_llama, tmp_path: Path, version, dtype
):
    """T6: on a bf16 base a scale near 1 moves too, at a rate at which bf16 would round it back."""
    model = tiny_llama().to(dtype)
    attach_adapters(model, AdapterConfig(version=version, prompt_length=3, start_layer=1), seed=1)
    for name, parameter in trainable_parameters(model):
        assert parameter.dtype == torch.float32
        if name.endswith("gate"):
            parameter.data.fill_(0.1)  # at 0 a prompt has no gradient
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=version == "v2",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=records())  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    trained = {name for name, _ in trainable_parameters(model)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name
    save_adapter(model, tmp_path / "adapter", base_model="tiny")
    other = tiny_llama().to(dtype)
    load_adapter(other, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens()).logits
        assert torch.equal(other(input_ids=tokens()).logits, expected)
