"""Every shipped document: it loads, DeepSpeed takes its part, its command is the one that runs it, its sparse
layout is sparse, and it fits the hardware in its name."""

import json
import shlex
from pathlib import Path
from typing import Literal

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from shipped_documents import DOCUMENTS, FOLDER, load_shipped, processes_of
from shipped_runs import seven_b

from sparse_llama import cli
from sparse_llama.config.deepspeed import OUR_BLOCKS
from sparse_llama.config.run import EMBEDDED, Overrides, Run, load_run
from sparse_llama.config.sparsity import BSLongformerSparsity
from sparse_llama.layouts import build_layout
from sparse_llama.planning.hardware import GIB, Hardware
from sparse_llama.planning.search import Planner
from sparse_llama.planning.shapes import find_base
from sparse_llama.training.engine import engine_config

HARDWARE = {
    "a100_40g": Hardware(40 * GIB, 96 * GIB),
    "a100_40g_x8": Hardware(40 * GIB, 640 * GIB),  # for eight processes together
    "rtx4090_24g": Hardware(24 * GIB, 64 * GIB),
    "h100_80g": Hardware(80 * GIB, 200 * GIB),
    "nvme": Hardware(40 * GIB, 32 * GIB, disk_bytes=100 * 10**9),
    "cpu_demo": Hardware(None, 8 * GIB),
}
"""What the beginning of a document's name stands for; the longest that it begins with counts."""


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.stem)
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def run(document: Path, tmp_path: Path) -> Run:
    return load_shipped(document, tmp_path)


def earlier(sparsity: BSLongformerSparsity, row: int) -> set[int]:
    """Return the blocks before block ``row`` that it sees (Beltagy et al. 2020, sec. 3.1: a window of w
    blocks, half on each side, and columns that everybody sees)."""
    assert sparsity.global_block_end_indices is None
    window = range(max(row - sparsity.num_sliding_window_blocks // 2, 0), row)
    return {*window, *(column for column in sparsity.global_block_indices if column < row)}


def density(sparsity: BSLongformerSparsity, num_tokens: int) -> float:
    """Return the share of the causal token pairs that attend, counted one row of blocks after the other."""
    attended = 0
    for row in range(-(-num_tokens // sparsity.block)):
        queries = min(sparsity.block, num_tokens - row * sparsity.block)
        attended += len(earlier(sparsity, row)) * sparsity.block * queries + queries * (queries + 1) // 2
    return attended / (num_tokens * (num_tokens + 1) // 2)


def hardware_of(document: Path) -> Hardware:
    named = [name for name in HARDWARE if document.stem.startswith(name)]
    return HARDWARE[max(named, key=len)]


def test_there_is_a_document_for_the_40_gb_gpu_and_one_for_any_cpu():
    assert {"a100_40g", "cpu_demo"} <= {path.stem for path in DOCUMENTS}


def test_the_long_documents_are_as_long_as_their_names_say(tmp_path: Path):
    lengths = {
        "a100_40g_32k": 32768,
        "a100_40g_262k": 262144,
        "a100_40g_512k": 524288,
        "h100_80g_512k": 524288,
        "a100_40g_x8_1m": 1048576,
    }
    for name, length in lengths.items():
        found = load_shipped(FOLDER / f"{name}.json", tmp_path)
        assert found.settings.seq_length == length
        assert found.settings.model.rope_parameters is not None, "the base has never seen such positions"
        assert found.notices == ()


def test_a_document_fits_the_hardware_in_its_name(document: Path, run: Run):
    """On a GPU 1.5 GiB are left to CUDA and fragmentation; the planner's word is what is tested here."""
    config = find_base(run.settings.model).config
    planner = Planner(config, hardware_of(document), processes_of(document))
    made = planner.at(run)
    assert planner.fits(made), planner.needs(made)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("adapter", ["v1", "v2"])
def test_the_run_that_went_out_of_memory_fits_in_all_four_variants(
    adapter: str, attention: Literal["dense", "sparse"], tmp_path: Path
):
    run = load_shipped(FOLDER / "a100_40g.json", tmp_path, adapter=adapter, attention=attention)
    planner = Planner(seven_b(), HARDWARE["a100_40g"])
    assert run.micro_batch_size * run.settings.seq_length == 4096
    assert planner.fits(planner.at(run)), planner.needs(planner.at(run))


def test_deepspeed_takes_its_part_of_a_document_and_nothing_of_ours_is_in_it(
    run: Run, document: Path, monkeypatch: pytest.MonkeyPatch
):
    """What DeepSpeed is given, in a job of the processes that the document is for."""
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda: 0)
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_world_size", lambda: processes_of(document))
    theirs = DeepSpeedConfig(engine_config(run))
    assert not set(OUR_BLOCKS) & run.deepspeed.keys()
    assert theirs.train_batch_size == run.global_batch_size * run.sequence_parallel_size
    assert theirs.zero_optimization_stage == run.zero_stage
    assert theirs.bfloat16_config.enabled == (run.precision == "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100_40g_262k", "a100_40g_512k"])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("adapter", ["v1", "v2"])
def test_the_longest_rows_of_one_gpu_fit_in_all_four_variants(
    adapter: str, attention: Literal["dense", "sparse"], name: str, tmp_path: Path
):
    run = load_shipped(FOLDER / f"{name}.json", tmp_path, adapter=adapter, attention=attention)
    planner = Planner(seven_b(), HARDWARE["a100_40g"])
    assert planner.fits(planner.at(run)), planner.needs(planner.at(run))


@pytest.mark.parametrize("world_size", [2, 8])
def test_a_document_fits_any_number_of_processes(document: Path, world_size: int, tmp_path: Path):
    sharing = processes_of(document)
    run = load_shipped(document, tmp_path, world_size * sharing)
    assert run.global_batch_size == run.micro_batch_size * run.gradient_accumulation_steps * world_size


def test_the_command_in_a_document_is_the_one_that_runs_it(document: Path, tmp_path: Path):
    command = json.loads(document.read_text(encoding="utf-8"))["_run"]
    launcher, *words = shlex.split(command)
    script = words.index("launch/train.py")
    assert launcher == "deepspeed"
    assert words[:script] == (
        [] if processes_of(document) == 1 else ["--num_gpus", str(processes_of(document))]
    )
    arguments = words[script + 1 :]
    parsed = cli.train_parser(None).parse_args(arguments)
    assert FOLDER.parent / parsed.ds_config == document
    assert (FOLDER.parent / words[script]).is_file()


def test_the_embedded_document_is_the_shipped_demo_to_the_byte():
    assert EMBEDDED.read_bytes() == (FOLDER / "cpu_demo.json").read_bytes()


def test_a_sparse_document_attends_to_at_most_half_of_the_pairs_at_its_own_length(document: Path, run: Run):
    sparsity = run.layouts.default
    if sparsity is None:
        pytest.skip("dense")
    assert isinstance(sparsity, BSLongformerSparsity), "write the definition of this mode above"
    length = run.settings.seq_length
    expected = density(sparsity, length)
    assert expected <= 0.5
    said = json.loads(document.read_text(encoding="utf-8"))["sparse_attention"]["_density"]
    assert said.startswith(f"{expected:.3f} of the causal token pairs at {length} tokens")

    num_blocks = -(-length // sparsity.block)
    layout = build_layout(sparsity, num_heads=2, num_blocks=num_blocks, seed=run.settings.seed)
    assert layout.density_at(length) == pytest.approx(expected, rel=1e-12)


def test_the_document_for_the_40_gb_gpu_is_the_setting_that_went_out_of_memory(tmp_path: Path):
    run = load_shipped(FOLDER / "a100_40g.json", tmp_path)
    assert run.settings.model.path == "openlm-research/open_llama_7b"
    assert run.settings.data.dataset == "databricks/databricks-dolly-15k"
    assert run.settings.adapter.version == "v2"
    assert run.settings.seq_length == 1024
    assert run.micro_batch_size == 4
    assert run.precision == "bf16"
    assert not run.layouts.is_dense
    assert run.checkpointing is not None


def test_the_demo_needs_neither_a_gpu_nor_a_download(tmp_path: Path):
    run = load_run(None, Overrides(output_dir=tmp_path), 1)
    assert run.settings.model.path.startswith("bundled:")
    assert run.settings.data.dataset.startswith("bundled:")
    assert run.precision == "fp32"
    assert run.offload == "none"
