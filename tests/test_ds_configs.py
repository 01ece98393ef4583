"""Every shipped document: it loads, DeepSpeed takes its part, its command is the one that runs it, and its
sparse layout is sparse."""

import json
import shlex
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from sparse_llama import cli
from sparse_llama.config.deepspeed import OUR_BLOCKS
from sparse_llama.config.run import EMBEDDED, Overrides, Run, load_run
from sparse_llama.config.sparsity import BSLongformerSparsity
from sparse_llama.layouts import build_layout

FOLDER = Path(__file__).parents[1] / "ds_configs"
DOCUMENTS = sorted(FOLDER.glob("*.json"))


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.stem)
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def run(document: Path, tmp_path: Path) -> Run:
    return load_run(document, Overrides(output_dir=tmp_path / "out"), 1)


def sees(sparsity: BSLongformerSparsity, row: int, column: int) -> bool:
    """Return whether block ``row`` sees block ``column`` (Beltagy et al. 2020, sec. 3.1: a window of w
    blocks, half on each side, and columns that everybody sees)."""
    assert sparsity.global_block_end_indices is None
    near = abs(row - column) <= sparsity.num_sliding_window_blocks // 2
    return near or column in sparsity.global_block_indices


def density(sparsity: BSLongformerSparsity, num_tokens: int) -> float:
    """Return the share of the causal token pairs that attend, counted one query token after the other."""
    attended = 0
    for query in range(num_tokens):
        for start in range(0, query + 1, sparsity.block):
            if sees(sparsity, query // sparsity.block, start // sparsity.block):
                attended += min(start + sparsity.block, query + 1) - start
    return attended / (num_tokens * (num_tokens + 1) // 2)


def test_there_is_a_document_for_the_40_gb_gpu_and_one_for_any_cpu():
    assert {"a100_40g", "cpu_demo"} <= {path.stem for path in DOCUMENTS}


def test_deepspeed_takes_its_part_of_a_document_and_nothing_of_ours_is_in_it(run: Run):
    theirs = DeepSpeedConfig(dict(run.deepspeed))
    assert not set(OUR_BLOCKS) & run.deepspeed.keys()
    assert theirs.train_batch_size == run.global_batch_size
    assert theirs.zero_optimization_stage == run.zero_stage
    assert theirs.bfloat16_config.enabled == (run.precision == "bf16")


@pytest.mark.parametrize("world_size", [2, 8])
def test_a_document_fits_any_number_of_processes(document: Path, world_size: int, tmp_path: Path):
    run = load_run(document, Overrides(output_dir=tmp_path / "out"), world_size)
    assert run.global_batch_size == run.micro_batch_size * run.gradient_accumulation_steps * world_size


def test_the_command_in_a_document_is_the_one_that_runs_it(document: Path, tmp_path: Path):
    command = json.loads(document.read_text(encoding="utf-8"))["_run"]
    launcher, script, *arguments = shlex.split(command)
    assert (launcher, script) == ("deepspeed", "launch/train.py")
    parsed = cli.train_parser(None).parse_args(arguments)
    assert FOLDER.parent / parsed.ds_config == document
    assert (FOLDER.parent / script).is_file()


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

    num_blocks = -(-run.settings.attention.master_length // sparsity.block)
    layout = build_layout(sparsity, num_heads=2, num_blocks=num_blocks, seed=run.settings.seed)
    assert layout.density_at(length) == pytest.approx(expected, rel=1e-12)


def test_the_document_for_the_40_gb_gpu_is_the_setting_that_went_out_of_memory(tmp_path: Path):
    run = load_run(FOLDER / "a100_40g.json", Overrides(output_dir=tmp_path), 1)
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
