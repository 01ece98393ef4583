"""``launch/show_layout.py`` as users start it: what it draws worked out by hand, and mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_processes import process_environment
from shipped_documents import DOCUMENTS, load_shipped

from sparse_llama import cli
from sparse_llama.reporting.expectation import CPU_EFFICIENCY

ROOT = Path(__file__).parents[2]
FIXED = {"mode": "fixed", "block": 16, "num_local_blocks": 4}
WINDOW = {"mode": "local_sliding_window", "block": 16, "num_sliding_window_blocks": 3}


@pytest.fixture(autouse=True)
def _narrow_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")


def show(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return what the command prints."""
    cli.main(cli.show_layout, cli.show_layout_parser("doc"), [str(argument) for argument in arguments])
    return capsys.readouterr().out


def show_block(capsys: pytest.CaptureFixture[str], block: dict[str, Any], *arguments: object) -> str:
    return show(capsys, "--sparse_attention", json.dumps(block), *arguments)


def pictures(printed: str) -> list[list[str]]:
    """Return the cells of every picture, a string a row, without its axes."""
    found: list[list[str]] = []
    for line in printed.splitlines():
        if re.match(r"^ {8}0", line):
            found.append([])
        elif found and re.match(r"^[ \d]{7}[ >][\u00b7\u2588\u2591-\u2593]", line):
            found[-1].append(line[8:])
    return found


def test_a_layout_is_drawn_block_by_block(capsys):
    """Windows of four blocks; the last block of each is seen by all after it."""
    (drawn,) = pictures(show_block(capsys, FIXED, "--seq_length", 160))
    full, none = "\u2588\u2588", "\u00b7\u00b7"
    assert drawn == [
        full,
        full * 2,
        full * 3,
        full * 4,
        none * 3 + full * 2,
        none * 3 + full * 3,
        none * 3 + full * 4,
        none * 3 + full * 5,
        none * 3 + full + none * 3 + full * 2,
        none * 3 + full + none * 3 + full * 3,
    ]


def test_density_counts_token_pairs(capsys):
    """Two whole blocks of 16 x 16 before the diagonal, three halved ones of 136 pairs, of 48 x 49 / 2."""
    printed = show_block(capsys, WINDOW, "--seq_length", 48)
    assert f"{100 * (2 * 256 + 3 * 136) / (48 * 49 / 2):.1f}% of the causal token pairs" in printed


def test_a_token_sees_its_window_and_the_global_blocks_before_it(capsys):
    """Token 100 is in block 6: its window begins with block 4, block 3 is global."""
    printed = show_block(capsys, FIXED, "--seq_length", 160, "--token", 100)
    assert "token 100 sees 48-100 (53 of 101)" in printed
    (drawn,) = [line for line in printed.splitlines() if ">" in line]
    assert drawn[8:] == "\u00b7" * 6 + "\u2588" * 8


def test_many_ranges_are_shortened_and_still_counted(capsys):
    printed = show_block(capsys, FIXED, "--seq_length", 2048, "--token", 2047)
    assert "sees 48-63, 112-127, 176-191, 240-255, 304-319, 368-383, ... 19 more ..., 1648-1663," in printed
    assert f"({31 * 16 + 64} of 2,048)" in printed


def test_every_distinct_pattern_is_drawn_once_with_its_heads(capsys):
    per_head = {"different_layout_per_head": True, "num_different_global_patterns": 2}
    printed = show_block(capsys, FIXED | per_head, "--seq_length", 128, "--num_heads", 5)
    assert len(pictures(printed)) == 2
    assert "heads 0, 2, 4, density" in printed
    assert "heads 1, 3, density" in printed
    alone = show_block(capsys, FIXED | per_head, "--seq_length", 128, "--num_heads", 5, "--head", 3)
    assert pictures(alone) == pictures(printed)[1:]


def test_random_blocks_of_every_head_do_not_flood_the_terminal(capsys):
    block = {"mode": "bigbird", "num_random_blocks": 1, "different_layout_per_head": True}
    printed = show_block(capsys, block, "--seq_length", 512, "--num_heads", 6)
    assert len(pictures(printed)) == 4
    assert "and 2 more patterns; --head H shows that of a head" in printed
    again = show_block(capsys, block, "--seq_length", 512, "--num_heads", 6, "--seed", 43)
    assert pictures(again) != pictures(printed)


def test_documents_of_a_row_have_layouts_of_their_own(capsys):
    """Document 2 starts at the next multiple of 16; its blocks see nothing of document 1."""
    flags = ("--seq_length", 256, "--documents", "40,100", "--token", 140)
    printed = show_block(capsys, WINDOW, *flags)
    (drawn,) = pictures(printed)
    assert len(drawn) == 10
    assert drawn[3] == "\u00b7" * 6 + "\u2588" * 2
    assert "2: tokens 0-39, 48-147" in printed
    assert "token 140 of document 2 sees 112-140 (29 of 93)" in printed
    pairs = [(2, 8), (6, 4)]  # blocks before a document's last, tokens of that
    active = sum(n * 136 + (n - 1) * 256 + last * (last + 1) // 2 + 16 * last for n, last in pairs)
    causal = 40 * 41 // 2 + 100 * 101 // 2
    assert f"{100 * active / causal:.1f}% of the causal token pairs, within documents" in printed


def test_a_shorter_row_is_cropped_from_the_files_layout(capsys, tmp_path: Path):
    """As in a run. Made anew for 5 blocks, the second pattern's last global block would move."""
    document = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "wandb": {"enabled": True},
        "sparse_attention": {
            "mode": "fixed",
            "num_local_blocks": 4,
            "num_global_blocks": 2,
            "different_layout_per_head": True,
            "num_different_global_patterns": 2,
        },
        "sparse_llama": {"seq_length": 256, "model": {"path": "nobody/nothing"}},
    }
    path = tmp_path / "eight_gpus.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    printed = show(capsys, "--ds_config", path, "--seq_length", 80)
    drawn = pictures(printed)[1]
    assert len(drawn) == 5
    assert drawn[4] == "\u2588" * 4 + "\u00b7" * 4 + "\u2588" * 2
    assert "of 32 heads" in printed


def test_the_heads_are_those_of_a_model_on_this_machine(capsys, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 40}', encoding="utf-8")
    path = written(tmp_path, {"sparse_attention": FIXED, "sparse_llama": {}}, str(tmp_path))
    assert "of all 40 heads" in show(capsys, "--ds_config", path)
    assert "of all 8 heads" in show(capsys, "--ds_config", path, "--num_heads", 8)


LAYERS = {
    "sparse_attention": WINDOW,
    "sparse_llama": {
        "seq_length": 128,
        "attention": {
            "dense_layers": [0, -1],
            "layouts": [{"layers": "::2", "sparse_attention": FIXED}],
        },
    },
}


def written(folder: Path, document: dict[str, Any], model: str) -> Path:
    """Return the file of ``document`` with ``model``."""
    settings = document["sparse_llama"] | {"model": {"path": model}}
    path = folder / "run.json"
    path.write_text(json.dumps(document | {"sparse_llama": settings}), encoding="utf-8")
    return path


def test_layers_of_one_layout_are_shown_together(capsys, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6}', encoding="utf-8")
    path = written(tmp_path, LAYERS, str(tmp_path))
    printed = show(capsys, "--ds_config", path)
    titles = [line.strip() for line in printed.splitlines() if line.startswith("layer")]
    assert titles == ["layers 0, 5", "layers 1, 3", "layers 2, 4"]
    assert len(pictures(printed)) == 2
    assert printed.count("expected speed-up") == 1
    # Of 8 block rows: 7 blocks before the diagonal, and twice 0 + 1 + 2 + 3 with 4 global ones.
    densities = [(256 * count + 8 * 136) / (128 * 129 / 2) for count in (7, 6 + 6 + 4)]
    low = 1 / (1 / 3 + sum(densities) / 3 / CPU_EFFICIENCY[0])  # a third of the layers is dense
    assert f"attention, CPU        {low:.1f}x to " in printed

    alone = show(capsys, "--ds_config", path, "--layer", 4)
    assert pictures(alone) == pictures(printed)[1:]
    assert "layer 4" in alone


def test_layers_of_a_model_that_is_elsewhere_are_shown_as_the_file_names_them(capsys, tmp_path: Path):
    path = written(tmp_path, LAYERS, "nobody/nothing")
    printed = show(capsys, "--ds_config", path)
    titles = [line.strip() for line in printed.splitlines() if line.startswith(("layer", "all other"))]
    assert titles == ["layers ::2", "layers 0, -1", "all other layers"]
    assert printed.count("expected speed-up") == 2
    assert "layers 0, 5" in show(capsys, "--ds_config", path, "--num_layers", 6)


def test_the_layers_of_a_gpt_neox_block_are_shown(capsys):
    block = {"attention_config": [[["global", "sparse_fixed"], 2]], "sparsity_config": {"block": 16}}
    printed = show_block(capsys, block, "--seq_length", 160)
    titles = [line.strip() for line in printed.splitlines() if line.startswith("layers")]
    assert titles == ["layers 0, 2", "layers 1, 3"]
    assert pictures(printed) == pictures(show_block(capsys, FIXED, "--seq_length", 160))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--layer", "1"),
            "--layer 1: layers differ, and how many the model has is not known; add ",
        ),
        (("--num_layers", "6", "--layer", "6"), "--layer 6: there are 6 layers; give 0 to 5"),
        (("--documents", "100,30"), "--documents: they take"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(flags, message: str, capsys, tmp_path: Path):
    with pytest.raises(SystemExit) as ended:
        show(capsys, "--ds_config", written(tmp_path, LAYERS, "nobody/nothing"), *flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_of_ds_configs_can_be_shown(path: Path, capsys, tmp_path: Path):
    printed = show(capsys, "--ds_config", path)
    run = load_shipped(path, tmp_path)
    assert f"{run.settings.seq_length:,} in " in printed
    assert pictures(printed)


def test_a_long_row_gains_and_a_short_one_hardly(capsys):
    block = {"mode": "local_sliding_window", "block": 64, "num_sliding_window_blocks": 65}
    short = show_block(capsys, block, "--seq_length", 8192, "--documents", 2048)
    long = show_block(capsys, block, "--seq_length", 65536)
    assert "PyTorch's own kernels" in " ".join(short.split())
    assert "worth it              yes" in long
    middle = " ".join(show_block(capsys, block, "--seq_length", 6144).split())
    assert "below about 8,192 tokens there is little to gain" in middle


def test_a_png_is_written_where_it_is_asked_for(capsys, tmp_path: Path):
    file = tmp_path / "new" / "layout.png"
    printed = show_block(capsys, FIXED, "--png", file)
    assert printed.rstrip().endswith(f"{file}: drawn")
    assert file.read_bytes().startswith(b"\x89PNG")


AD_HOC = "--sparse_attention fixed"
MISTAKES = {
    "--sparse_attention fixd": "--sparse_attention: no mode is called 'fixd'; allowed: dense, fixed, ",
    "--sparse_attention {": "--sparse_attention: line 1, column 2: not JSON: ",
    '--sparse_attention {"blok":16}': (
        "--sparse_attention: sparse_attention.blok: unknown key; did you mean 'block'?"
    ),
    f"{AD_HOC} --ds_config a.json": "--ds_config and --sparse_attention are both given; keep one of them",
    "--ds_config missing.json": "missing.json: no such file",
    f"{AD_HOC} --seq_length 0": "--seq_length: must be >= 1 and < 2**31, got 0",
    f"{AD_HOC} --head 32": "--head 32: there are 32 heads; give 0 to 31",
    f"{AD_HOC} --token 8192": "--token 8192: no such token; the row has tokens 0-8191",
    f"{AD_HOC} --documents 5,40 --token 7": "--token 7: no such token; the row has tokens 0-4, 16-55",
    f"{AD_HOC} --documents 5,": "--documents: must be lengths of 1 and more with commas, such as 300,500",
    f"{AD_HOC} --documents 5,0": "--documents: must be lengths of 1 and more with commas, such as 300,500",
    f"{AD_HOC} --documents 4001,4190": (
        "--documents: they take 8206 tokens, each from a multiple of 16 on, and the row has 8192; shorten "
        "them, or give --seq_length 8206"
    ),
    '--sparse_attention {"mode":"bigbird","num_random_blocks":9} --seq_length 64': (
        "--sparse_attention: sparse_attention.num_random_blocks: 9 blocks of 16, but a layout of 64 tokens"
    ),
    f"{AD_HOC} --png /": "--png /: cannot be written (Is a directory); name a file",
    "--sparse_atention fixed": "--sparse_atention: unknown flag; did you mean '--sparse_attention'?",
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_status_2(line: str, message: str, capsys):
    with pytest.raises(SystemExit) as ended:
        show(capsys, *line.split(" "))
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_the_script_answers_without_the_libraries_that_take_seconds():
    watched = (
        "import runpy, sys\n"
        "sys.argv = ['launch/show_layout.py', '--sparse_attention', 'fixed']\n"
        "runpy.run_path('launch/show_layout.py', run_name='__main__')\n"
        "print(sorted({'deepspeed', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched],
        cwd=ROOT,
        env=process_environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n[]\n")
    assert done.stdout.isascii()
