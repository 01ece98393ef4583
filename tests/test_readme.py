"""What README.md shows is there and works: commands, flags, JSON, links, files."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from adapted_models import save_adapted

from sparse_llama.adapters import active_adapters
from sparse_llama.config.document import parse_document
from sparse_llama.config.run import Overrides, load_run
from sparse_llama.errors import ConfigError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCHERS = ("deepspeed", "python", "pytest", "pip", "lm_eval")


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def inline() -> list[str]:
    """Return the code within lines of text."""
    text = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


def commands() -> Iterator[list[str]]:
    """Yield every command shown, as words."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *(code for code in inline() if " " in code)]:
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words and words[0] in LAUNCHERS:
                yield words


COMMANDS = list(commands())
SCRIPTS = sorted({word for words in COMMANDS for word in words if word.startswith("launch/")})


def flags_of(script: str) -> set[str]:
    """Return the flags that a launch script's ``--help`` shows."""
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][\w-]*", done.stdout))


def test_every_bash_line_is_a_command_that_these_tests_know():
    lines = [
        line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()
    ]
    assert lines
    for line in lines:
        for command in line.split("&&"):
            assert shlex.split(command)[0] in LAUNCHERS, line


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_shown_with_a_script_is_one_of_its_flags(script: str):
    known = flags_of(script)
    shown = {
        word.split("=")[0]
        for words in COMMANDS
        if script in words
        for word in words[words.index(script) :]
        if word.startswith("--")
    }
    assert shown <= known


def test_every_flag_named_in_the_text_is_a_flag_of_some_script():
    known = {flag for script in SCRIPTS for flag in flags_of(script)} | {"--help"}
    named = {code.split()[0].split("=")[0] for code in inline() if code.startswith("--")}
    assert len(named) >= 5
    assert named <= known


def test_every_module_that_is_run_exists():
    modules = [words[words.index("-m") + 1] for words in COMMANDS if "-m" in words and words[0] == "python"]
    assert modules
    assert [name for name in modules if find_spec(name) is None] == []


def test_every_file_named_exists():
    folders = ("sparse_llama/", "launch/", "tests/", "ds_configs/", "docs/", "constraints.txt")
    words = {
        word for code in [*inline(), *blocks("bash")] for word in code.split() if word.startswith(folders)
    }
    assert len(words) >= 10
    assert [word for word in sorted(words) if not (ROOT / word).exists()] == []


def test_every_relative_link_leads_somewhere():
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", README)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("text", blocks("json"), ids=lambda text: str(len(text)))
def test_every_json_shown_is_a_document_without_idle_parts(text: str, tmp_path: Path):
    path = tmp_path / "shown.json"
    path.write_text(text, encoding="utf-8")
    run = load_run(path, Overrides(output_dir=tmp_path / "out"), 1)
    assert run.notices == ()
    assert run.settings.seq_length == parse_document(text)["sparse_llama"]["seq_length"]


def test_the_error_shown_is_the_error_said(tmp_path: Path):
    (shown,) = re.findall(r"^error: ds_configs/mine\.json: (\w+)(: .*)$", README, flags=re.MULTILINE)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({shown[0]: 4}), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_run(path, Overrides(output_dir=tmp_path / "out"), 1)
    assert str(refused.value) == f"{path}: {shown[0]}{shown[1]}"


def test_every_mode_of_sparse_attention_is_named():
    from sparse_llama.config.sparsity import MODES

    assert set(MODES) <= set(inline())


def test_the_continuous_integration_runs_commands_that_are_there():
    """``.ci/run`` takes them from between its marks."""
    marks = re.findall(r"run_command (\w+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert {"demo", "test"} <= set(marks)
    for mark in marks:
        assert re.search(rf"^<!-- ci:{mark} -->\n```bash\n\S", README, flags=re.MULTILINE), mark


def test_the_adapters_in_python_work_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (block,) = (block for block in blocks("python") if "load_adapter" in block)
    (tmp_path / "sparse_llama").symlink_to(ROOT / "sparse_llama")
    monkeypatch.chdir(tmp_path)
    save_adapted(tmp_path / "runs" / "cpu_demo" / "adapter", "bundled:tiny-llama", version="v2")
    names: dict[str, Any] = {}
    exec(block, names)
    assert active_adapters(names["model"]) == {"default": 1.0}
    assert (tmp_path / "adapters" / "mine" / "adapter.safetensors").is_file()
