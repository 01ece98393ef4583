"""Everything a run needs before its first step, made in the order in which mistakes are cheapest to find."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import LlamaForCausalLM

from sparse_llama import __version__
from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.adapters.weights import AdapterFile, BaseModelReference
from sparse_llama.attention.interface import AttentionPlan
from sparse_llama.attention.ulysses import check_heads
from sparse_llama.config.run import Run
from sparse_llama.config.schedule import Schedule, num_optimizer_steps
from sparse_llama.data.batches import Batch, Batches, Shard
from sparse_llama.data.ledger import Ledger
from sparse_llama.data.prepare import PreparedData, prepare_data
from sparse_llama.data.records import Example
from sparse_llama.data.template import with_template
from sparse_llama.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from sparse_llama.distributed import ranks
from sparse_llama.distributed.sequence import join_sequence_group
from sparse_llama.generation import encode_prompt, longest_sequence
from sparse_llama.model.assemble import DTYPES, Assembled, assemble
from sparse_llama.model.checks import check_logits
from sparse_llama.model.configuration import read_config
from sparse_llama.model.files import resolve_model
from sparse_llama.model.objective import TokenLoss
from sparse_llama.model.rope import run_positions
from sparse_llama.training.checkpoint import check_tensors
from sparse_llama.training.engine import count_elements, engine_config, start_engine
from sparse_llama.training.masters import write_masters


@dataclass
class Session:
    """A run ready to train."""

    run: Run
    engine: Any  # DeepSpeed's engine has no types
    objective: TokenLoss
    llama: LlamaForCausalLM
    parameters: dict[str, nn.Parameter]
    tokenizer: Tokenizer
    """With the run's template."""
    batches: Batches
    validation_batches: list[Batch]
    validation_examples: list[Example]
    answerable: list[Example]
    """Of these, the prompts that the model has room to answer; plain text asks nothing."""
    ledger: Ledger
    plan: AttentionPlan
    adapter: AdapterFile
    total_steps: int
    notices: tuple[str, ...]
    """What the model and the data have to say, beside ``run.notices``."""


def prepare(run: Run, console: Console) -> Session:
    """Return the session of ``run``: tokenizer and data first, then the model, then the engine.

    Raises:
        SparseLlamaError: whatever is wrong with the model, the data set, or both together.
    """
    settings = run.settings
    folder = _resolve_on_main_first(settings.model.path, settings.model.revision)
    config = read_config(folder)
    run_positions(config, settings)  # refuses a run that is too long; assemble makes the model by it
    sharing = run.sequence_parallel_size
    check_heads(
        config.num_attention_heads,
        config.num_key_value_heads or config.num_attention_heads,
        sharing,
        num_groups=settings.memory.num_head_groups or 1,
    )
    tokenizer = with_template(load_tokenizer(folder), folder, settings.data.template)
    check_vocabulary(tokenizer, config.vocab_size)
    console.print(f"reading {settings.data.dataset} ...")
    data = prepare_data(
        settings,
        tokenizer,
        align=run.layouts.align,
        micro_batch_size=run.micro_batch_size,
        accumulation=run.gradient_accumulation_steps,
        rank=ranks.rank() // sharing,
        world_size=ranks.world_size() // sharing,
        shard=Shard(ranks.rank() % sharing, sharing),
        console=console,
    )
    steps, epochs = settings.training.steps, settings.training.epochs
    total_steps = steps or num_optimizer_steps(data.batches.num_rows, run.global_batch_size, epochs or 1)
    schedule = None if run.schedule is None else run.schedule.resolve(total_steps)

    console.print(f"loading {settings.model.path} ...")
    assembled, objective, engine = start_model(run, schedule)
    llama = assembled.model
    parameters = dict(trainable_parameters(llama))
    adapter = _describe(run, assembled, parameters)
    if assembled.start is not None:
        check_tensors(f"--adapter {settings.training.init_adapter}", assembled.start, parameters)
        write_masters(engine, parameters, assembled.start)
    with assembled.plan.each_rank_alone():
        _check_first_logits(run, llama, data)
    return Session(
        run=run,
        engine=engine,
        objective=objective,
        llama=llama,
        parameters=parameters,
        tokenizer=tokenizer,
        batches=data.batches,
        validation_batches=data.validation_batches,
        validation_examples=data.validation_examples,
        answerable=_answerable(data.validation_examples, llama, tokenizer),
        ledger=data.ledger,
        plan=assembled.plan,
        adapter=adapter,
        total_steps=total_steps,
        notices=_notices(run, assembled, data),
    )


def start_model(run: Run, schedule: Schedule | None) -> tuple[Assembled, TokenLoss, Any]:
    """Return the adapted model of ``run``, its loss, and the engine around that."""
    settings = run.settings
    torch.manual_seed(settings.seed)
    assembled = assemble(
        settings,
        run.layouts,
        dtype=DTYPES[run.precision],
        device=ranks.device(),
        checkpointing=run.checkpointing,
        zero3_config=engine_config(run) if run.zero_stage == 3 else None,
        sequence=join_sequence_group(run.sequence_parallel_size),
    )
    objective = TokenLoss(assembled.model, loss_tile=settings.memory.loss_tile)
    return assembled, objective, start_engine(run, objective, assembled.model, schedule)


def _answerable(examples: list[Example], llama: LlamaForCausalLM, tokenizer: Tokenizer) -> list[Example]:
    longest, _ = longest_sequence(llama)
    return [one for one in examples if one.prompt and len(encode_prompt(tokenizer, one.prompt)) < longest]


def _resolve_on_main_first(path: str, revision: str | None) -> Path:
    """Return the model's folder; the main rank downloads, the others then find it in the cache."""
    with ranks.main_first():
        return resolve_model(path, revision)


def _describe(run: Run, assembled: Assembled, parameters: dict[str, nn.Parameter]) -> AdapterFile:
    settings = run.settings
    model, master_length = settings.model, settings.attention.master_length
    assert master_length is not None, "a resolved run has its master length"
    layouts = run.layouts.packed().to_json()
    return AdapterFile.model_validate(
        {
            "base_model": BaseModelReference(path=model.path, revision=model.revision),
            "adapter": assembled.adapter,
            "sparse_attention": layouts["sparse_attention"],
            "layer_layouts": layouts["layouts"],
            "dense_layers": layouts["dense_layers"],
            "master_length": master_length,
            "seed": settings.seed,
            "seq_length": settings.seq_length,
            "rope_parameters": assembled.rope_parameters,
            "template": settings.data.template,
            "dtype": str(DTYPES[run.precision]).removeprefix("torch."),
            "trainable_parameters": sum(count_elements(parameter) for parameter in parameters.values()),
            "version": __version__,
        }
    )


def _check_first_logits(run: Run, llama: LlamaForCausalLM, data: PreparedData) -> None:
    """Look at the base's first logits before anybody waits for a validation; every rank must call it."""
    ids = data.validation_batches[0].input_ids[:1, :16].to(ranks.device())
    with torch.no_grad():
        logits = llama(input_ids=ids, use_cache=False).logits
    model = run.settings.model
    check_logits(logits, source=model.path, random_weights=model.random_weights)


def _notices(run: Run, assembled: Assembled, data: PreparedData) -> tuple[str, ...]:
    notices = [*assembled.notices, *data.ledger.warnings()]
    length, longest = run.settings.seq_length, data.ledger.training.longest_document
    plan = assembled.plan
    if plan.is_sparse_at(length) and not plan.is_sparse_at(longest):
        notices.append(
            f"sparse_attention: no document is longer than {longest} tokens, and up to there this layout is "
            "fully causal: the numbers are those of dense attention"
        )
    return tuple(notices)
