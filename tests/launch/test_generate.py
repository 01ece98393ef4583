"""``launch/generate.py`` as users start it: the answer alone on standard output, and mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from adapted_models import save_adapted
from rank_processes import process_environment

from sparse_llama import cli
from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.generation import generate_batch
from sparse_llama.model.assemble import open_model

ROOT = Path(__file__).parents[2]
BASE = "bundled:tiny-llama"
QUESTION, CONTEXT = "Where does Tom live?", "Tom lives in Lima. Ann lives in Oslo."
SPARSE = {"mode": "local_sliding_window", "block": 16, "num_sliding_window_blocks": 3}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that trained a sparse v2 adapter."""
    folder = tmp_path_factory.mktemp("run")
    save_adapted(folder / "adapter", BASE, version="v2", block=SPARSE)
    return folder


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/generate.py", *arguments],
        cwd=ROOT,
        env=process_environment() | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def generate(*arguments: str | Path) -> None:
    cli.main(cli.generate, cli.generate_parser("doc"), [str(argument) for argument in arguments])


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    generate(*arguments)
    return capsys.readouterr().out


@pytest.mark.real_data
def test_the_script_continues_the_beginning_of_sequence_as_published_and_prints_nothing_else(shared: Path):
    model = shared / "models" / "stories260K"
    done = start("--model", str(model), "--raw", "--prompt", "", "--max_new_tokens", "200", "--local_rank=0")
    assert done.returncode == 0, done.stderr
    published = (model / "GREEDY.txt").read_text(encoding="utf-8")
    assert done.stdout[: len(published)] == published
    assert done.stdout.endswith("\n")


@pytest.mark.parametrize("context", ["", CONTEXT])
def test_the_prompt_is_put_into_the_template_of_training(run_folder, capsys, context):
    opened = open_model(BASE, run_folder / "adapter")
    (expected,) = generate_batch(opened.model, opened.tokenizer, [alpaca_prompt(QUESTION, context)], 12)
    arguments = ["--adapter", run_folder, "--prompt", QUESTION, "--max_new_tokens", "12"]
    found = printed(capsys, *arguments, *(["--context", context] if context else []))
    assert expected.strip()
    assert found == f"{expected}\n"


def test_raw_text_is_continued_as_it_stands(run_folder, capsys):
    opened = open_model(BASE, run_folder / "adapter")
    (expected,) = generate_batch(opened.model, opened.tokenizer, ["Tom lives"], 12)
    arguments = ["--raw", "--prompt", "Tom lives", "--max_new_tokens", "12"]
    assert printed(capsys, "--adapter", run_folder / "adapter", *arguments) == f"{expected}\n"
    assert printed(capsys, "--model", BASE, "--dtype", "float32", *arguments) != f"{expected}\n"


def test_a_seed_repeats_a_sample(run_folder, capsys):
    arguments = ["--adapter", run_folder, "--prompt", QUESTION, "--max_new_tokens", "20"]
    warm = [*arguments, "--temperature", "2.0", "--top_p", "0.95", "--top_k", "50"]
    first = printed(capsys, *warm, "--seed", "1")
    assert printed(capsys, *warm, "--seed", "1") == first
    assert printed(capsys, *warm, "--seed", "2") != first
    assert printed(capsys, *arguments, "--temperature", "2.0", "--top_k", "1") == printed(capsys, *arguments)


def test_an_answer_of_no_given_length_ends_where_the_model_does_and_says_so(run_folder, capsys):
    """T28: the adapter's layout extends itself, the base's positions do not."""
    prompt = "Tom lives in Lima. " * 310
    generate("--adapter", run_folder, "--raw", "--prompt", prompt)
    captured = capsys.readouterr()
    (note,) = [line for line in captured.err.splitlines() if line.startswith("note: ")]
    opened = open_model(BASE, run_folder / "adapter")
    room = 2048 - 1 - len(opened.tokenizer.encode(prompt))
    assert 0 < room < 256
    assert f"at most {room} tokens" in note


def test_only_the_main_process_of_a_job_answers(run_folder, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert printed(capsys, "--adapter", run_folder, "--prompt", QUESTION) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--adapter", "RUN", "--prompt", "w " * 2400],
            r"the prompt: \d+ tokens leave no room to answer in 2048, the max",
        ),
        (
            ["--adapter", "RUN", "--prompt", "Who?", "--max_new_tokens", "2030"],
            r"--max_new_tokens: 2030 .* use at most \d+$",
        ),
        (["--model", BASE, "--prompt", "Who?", "--temperature", "-1"], "--temperature: must be 0"),
        (["--model", BASE, "--prompt", "Who?", "--top_k", "5"], "--top_k: has no effect at --temperature 0"),
        (
            ["--model", BASE, "--prompt", "Who?", "--max_new_tokens", "0"],
            "--max_new_tokens: must be at least 1",
        ),
        (
            ["--model", BASE, "--prompt", "Who?", "--raw", "--context", "Ann."],
            "--context: belongs to the template",
        ),
        (["--model", BASE], "--prompt"),
        (["--prompt", "Who?"], "no model to open; give --model, --adapter, or both"),
        (["--adapter", "missing", "--prompt", "Who?"], "missing: no such file or folder"),
        (
            ["--model", BASE, "--prompt", "Who?", "--temprature", "1"],
            r"--temprature: .* did you mean '--temperature'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run_folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        generate(*(str(run_folder) if argument == "RUN" else argument for argument in arguments))
    assert ended.value.code == 2
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert re.search(message, said[0]), said[0]
    assert captured.out == ""
