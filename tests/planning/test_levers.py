"""A lever is said three times, as JSON keys, as flags and as a change of a run: the three are one."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from shipped_runs import ROOT, run_of, seven_b
from transformers import LlamaConfig

from sparse_llama.cli.flags import add_run_flags, overrides
from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.planning.document import changed_document, write_document
from sparse_llama.planning.levers import (
    STREAMED,
    Lever,
    checkpoint,
    combine,
    group_counts,
    head_groups,
    ladder,
    number_checkpoints,
    one_row,
    ordinal,
    small_buckets,
    smaller_micro_batch,
    tile,
)

DOCUMENT = ROOT / "ds_configs" / "a100_40g.json"


def with_buckets(num_elements: int | str) -> Run:
    """Return the document's run with reduction buckets of a size."""
    run = run_of()
    zero = run.deepspeed["zero_optimization"] | {"reduce_bucket_size": num_elements}
    return replace(run, deepspeed=run.deepspeed | {"zero_optimization": zero})


LEVERS = [
    small_buckets(with_buckets(5 * 10**8)) or pytest.fail("stage 2 has a buffer"),
    tile("loss_tile"),
    tile("mlp_tile", 1024),
    tile("norm_tile"),
    checkpoint("gpu"),
    checkpoint("cpu"),
    checkpoint("nvme", "/drive"),
    head_groups(4),
    STREAMED,
    combine((checkpoint("cpu"), number_checkpoints(2, 32), tile("loss_tile"))),
    one_row(run_of()),
    smaller_micro_batch(run_of()) or pytest.fail("four rows can be two"),
]


def by_flags(lever: Lever) -> Run:
    """Return the run of the document with the lever's flags, as ``launch/train.py`` reads them."""
    flags = argparse.ArgumentParser()
    add_run_flags(flags)
    parsed = flags.parse_args([*lever.flags, "--output_dir", "nowhere"])
    return load_run(DOCUMENT, overrides(parsed), 1, is_main=False)


def same(run: Run, other: Run) -> bool:
    return (run.deepspeed, run.settings, run.checkpointing) == (
        other.deepspeed,
        other.settings,
        other.checkpointing,
    )


@pytest.mark.parametrize("lever", [one for one in LEVERS if one.flags], ids=lambda lever: lever.name)
def test_the_flags_of_a_lever_do_what_its_keys_do(lever: Lever):
    """What a refusal proposes must be what it planned."""
    assert same(by_flags(lever), lever.apply(run_of()))


@pytest.mark.parametrize("lever", LEVERS, ids=lambda lever: lever.name)
def test_a_document_with_the_keys_is_the_same_run(lever: Lever, tmp_path: Path):
    file = tmp_path / "changed.json"
    write_document(file, changed_document(DOCUMENT, Overrides(), lever.keys, comments={"_about": "mine"}))
    loaded = load_run(file, Overrides(output_dir=tmp_path / "out"), 1)
    assert same(loaded, lever.apply(run_of()))
    assert loaded.notices == ()


@pytest.mark.parametrize("lever", LEVERS, ids=lambda lever: lever.name)
def test_a_lever_is_on_after_it_was_applied(lever: Lever):
    run = run_of(zero_stage=1, checkpointing="none")
    assert not lever.is_on(run)
    assert lever.is_on(lever.apply(run))


def test_a_micro_batch_gets_smaller_and_the_step_keeps_its_rows():
    run = run_of()
    halved = smaller_micro_batch(run)
    assert halved is not None
    changed = halved.apply(run)
    assert (changed.micro_batch_size, changed.gradient_accumulation_steps) == (2, 32)
    assert changed.micro_batch_size * changed.gradient_accumulation_steps == changed.global_batch_size == 64
    single = one_row(run).apply(run)
    assert (single.micro_batch_size, single.gradient_accumulation_steps) == (1, 64)
    assert smaller_micro_batch(single) is None


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_rung_has_its_own_levers_and_no_other(device: str):
    """Whatever the document switches on: rung 0 is a plain run."""
    busy = combine((checkpoint("cpu"), tile("loss_tile", 7), head_groups(2), STREAMED)).apply(run_of())
    plain = ladder(device, seven_b(), 32)[0].lever(busy).apply(busy)
    assert plain.checkpointing is None
    assert set(plain.settings.memory.model_dump().values()) == {None}
    assert "offload_param" not in plain.deepspeed["zero_optimization"]
    for rung in ladder(device, seven_b(), 32)[1:]:
        climbed = rung.lever(busy).apply(busy)
        assert climbed.checkpointing is not None
        assert same(climbed, rung.lever(plain).apply(plain)) or "weights" in rung.name


def test_on_a_cpu_nothing_moves_to_the_host_it_is_on():
    names = [rung.name for rung in ladder("cpu", seven_b(), 32)]
    assert not any("host" in name or "weights" in name for name in names)
    assert [rung.number for rung in ladder("cpu", seven_b(), 32)] == list(range(len(names)))
    assert len(ladder("cuda", seven_b(), 32)) == 11


def test_a_changed_document_keeps_the_users_comments_but_not_what_became_untrue(tmp_path: Path):
    changed = changed_document(DOCUMENT, Overrides(seq_length=4096), {}, comments={"_about": "mine"})
    assert next(iter(changed.items())) == ("_about", "mine")
    assert "_run" not in changed
    assert "_density" not in changed["sparse_attention"]
    assert changed["scheduler"]["_warmup"] == json.loads(DOCUMENT.read_text())["scheduler"]["_warmup"]
    assert changed["sparse_llama"]["seq_length"] == 4096


def test_numbers_are_read_aloud():
    assert [ordinal(number) for number in (2, 3, 4, 11, 21, 112)] == [
        "2nd",
        "3rd",
        "4th",
        "11th",
        "21st",
        "112th",
    ]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sharing", "counts"),
    [
        (32, 32, 1, (4, 8)),
        (32, 8, 1, (4, 8)),
        (4, 2, 1, (4,)),
        (2, 2, 1, (2,)),
        (1, 1, 1, ()),
        (32, 32, 4, (4, 8)),
        (32, 32, 8, (4,)),  # a group of 8 has four heads, for eight ranks
        (32, 32, 32, ()),
    ],
)
def test_groups_of_heads_are_proposed_that_the_model_can_have(
    heads: int, kv_heads: int, sharing: int, counts: tuple[int, ...]
):
    config = LlamaConfig(hidden_size=64, num_attention_heads=heads, num_key_value_heads=kv_heads)
    assert group_counts(config, sharing) == counts
    names = [rung.name for rung in ladder("cuda", config, 32, sharing)]
    assert [name for name in names if "head groups" in name] == [f"+ {count} head groups" for count in counts]
