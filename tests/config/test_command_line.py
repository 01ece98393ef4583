"""``launch/train.py`` and mistakes: one line on standard error, exit status 2, before torch is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_llama import cli
from sparse_llama.config.run import Overrides

ROOT = Path(__file__).parents[2]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the only line that ``launch/train.py`` prints about mistaken arguments."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(cli.train, cli.train_parser("doc"), arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err[:-1]


UNKNOWN = {
    "--seqlength": "; did you mean '--seq_length'?",
    "--zero-stage": "; did you mean '--zero_stage'?",
    "--ds-config": "; did you mean '--ds_config'?",
    "--deepspeed_config": "; did you mean '--ds_config'?",
    "--overwrit": "; did you mean '--overwrite'?",
    "--step": "; did you mean '--steps'?",
    "--xyzzy": "",
    "stray": " (a value without its flag)",
}


@pytest.mark.parametrize(("flag", "hint"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_flag_is_refused_with_the_nearest_known_one(capsys, flag: str, hint: str):
    assert said(capsys, flag) == f"error: {flag}: unknown flag{hint}; see --help"


WRONG = {
    ("--zero_stage", "4"): "argument --zero_stage: invalid choice: 4 (choose from 0, 1, 2, 3); see --help",
    ("--steps", "many"): "argument --steps: invalid int value: 'many'; see --help",
    ("--lr",): "argument --lr: expected one argument; see --help",
    ("--offload", "disk"): "argument --offload: invalid choice: 'disk' (choose from ",
    ("--steps", "0"): "--steps: must be >= 1 and < 2**63, got 0",
    ("--ds_config", "/nonexistent.json"): "/nonexistent.json: no such file",
    ("--offload", "cpu"): "--offload cpu: not at ZeRO stage 0; ",
    ("--resume", "--overwrite"): "--resume continues a run and --overwrite replaces it; give one of them",
}


@pytest.mark.parametrize(("arguments", "line"), WRONG.items(), ids=[" ".join(key) for key in WRONG])
def test_a_wrong_flag_is_refused_in_one_line(capsys, arguments: tuple[str, ...], line: str):
    assert said(capsys, *arguments).startswith(f"error: {line}")


def test_every_field_of_the_overrides_has_its_flag_and_its_type():
    arguments = [
        "--zero_stage=3", "--offload=nvme", "--nvme_path=/drive", "--seq_length=64", "--attention=sparse",
        "--adapter=v1", "--model=m", "--dataset=d", "--output_dir=o", "--steps=2", "--epochs=3", "--lr=1e-4",
        "--seed=5", "--resume=r", "--overwrite", "--checkpointing=nvme", "--number_checkpoints=6",
        "--loss_tile=7", "--mlp_tile=8", "--norm_tile=9", "--head_groups=4", "--micro_batch_size=2",
        "--rope=yarn", "--save_every=11", "--time_budget_s=12.5",
    ]  # fmt: skip
    parsed = cli.overrides(cli.train_parser(None).parse_args(arguments))
    assert parsed == Overrides(
        zero_stage=3, offload="nvme", nvme_path=Path("/drive"), seq_length=64, attention="sparse",
        adapter="v1", model="m", dataset="d", output_dir=Path("o"), steps=2, epochs=3, lr=1e-4, seed=5,
        resume=Path("r"), overwrite=True, checkpointing="nvme", number_checkpoints=6, loss_tile=7,
        mlp_tile=8, norm_tile=9, head_groups=4, micro_batch_size=2, rope="yarn", save_every=11,
        time_budget_s=12.5,
    )  # fmt: skip
    assert None not in vars(parsed).values()
    assert cli.overrides(cli.train_parser(None).parse_args([])) == Overrides()
    for resume in (["--resume"], ["--resume", "auto"]):
        assert cli.overrides(cli.train_parser(None).parse_args(resume)).resume == "auto"


def test_a_message_of_several_lines_is_printed_as_one(capsys, tmp_path: Path):
    path = tmp_path / "two\nlines.json"
    assert said(capsys, "--ds_config", str(path)) == f"error: {tmp_path}/two lines.json: no such file"


def test_other_ranks_let_the_main_one_speak_and_speak_only_if_they_outlive_it(
    capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("LOCAL_RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "8")

    def killed(seconds: float) -> None:
        assert seconds > 5  # the launcher looks once a second which rank has ended
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", killed)
    with pytest.raises(KeyboardInterrupt):
        cli.main(cli.train, cli.train_parser("doc"), ["--ds_config", "/nonexistent.json"])
    assert capsys.readouterr() == ("", "")

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    line = said(capsys, "--ds_config", "/nonexistent.json")
    assert line == "error: /nonexistent.json: no such file (rank 7)"


def test_the_script_names_file_and_key_before_torch_is_imported(tmp_path: Path):
    path = tmp_path / "typo.json"
    path.write_text(json.dumps({"zero_optimization": {"stag": 2}}), encoding="utf-8")
    watched = (
        "import runpy, sys\n"
        "sys.argv = ['launch/train.py', '--ds_config', sys.argv[1]]\n"
        "try:\n"
        "    runpy.run_path('launch/train.py', run_name='__main__')\n"
        "finally:\n"
        "    print(sorted({'torch', 'deepspeed', 'transformers', 'numpy', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched, str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {path}: zero_optimization.stag: unknown key; did you mean 'stage'?\n"
    assert done.stdout == "[]\n"
