"""What is shown, and what is given to others: no secret, no name, no home folder."""

import getpass
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from sparse_llama.doctor import report
from sparse_llama.doctor.checks import SECTIONS
from sparse_llama.doctor.findings import Finding
from sparse_llama.doctor.job import merge
from sparse_llama.doctor.report import is_bad, show_section, to_json, to_text, verdict, without_secrets

OK = Finding("torch", "ok", "2.13.0")
LOOK = Finding("async_io", "warn", "cannot be built", "apt install libaio-dev")
BAD = Finding("deepspeed", "fail", "0.18.0; asked for: >=0.19.8", "pip install 'deepspeed>=0.19.8'")


def whole(*rows: Finding) -> dict[str, list[Finding]]:
    return {section: [*rows] if section == SECTIONS[0] else [] for section in SECTIONS}


@pytest.mark.parametrize(
    ("found", "said", "bad"),
    [
        (whole(OK), "This machine can run sparse-llama.", False),
        (whole(OK, LOOK), "This machine can run sparse-llama; 1 thing to look at.", False),
        (
            whole(OK, LOOK, LOOK, BAD),
            "This machine cannot run sparse-llama correctly as it is: deepspeed; 2 things to look at.",
            True,
        ),
        ({"software": [OK]}, "Nothing is broken in what was looked at (software).", False),
    ],
)
def test_the_verdict_is_a_line(found, said: str, bad: bool):
    assert verdict(found) == said
    assert is_bad(found) is bad


def test_what_to_do_stands_under_the_row(capsys):
    show_section("software", [OK, LOOK, BAD], Console(width=110))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "software"
    assert [line.split()[0] for line in lines[1:]] == ["ok", "look", "->", "FAIL", "->"]
    assert lines[-1].strip() == "-> pip install 'deepspeed>=0.19.8'"


def test_nothing_is_coloured_in_a_file_and_everything_on_a_terminal(capsys):
    show_section("software", [BAD], Console(width=110))
    assert "\x1b" not in capsys.readouterr().out
    show_section("software", [BAD], Console(width=110, force_terminal=True, color_system="standard"))
    assert "\x1b[1;31mFAIL" in capsys.readouterr().out


def test_the_text_and_the_json_hold_the_same_rows():
    found = whole(OK, BAD)
    lines = to_text(found).splitlines()
    assert lines[0] == verdict(found)
    assert "FAIL  deepspeed  0.18.0; asked for: >=0.19.8 -> pip install 'deepspeed>=0.19.8'" in lines
    document = json.loads(to_json(found))
    assert document["is_bad"] is True
    assert document["sections"]["software"][1] == {
        "name": "deepspeed",
        "status": "fail",
        "found": BAD.found,
        "advice": BAD.advice,
    }


def test_secrets_names_and_home_stay_here(monkeypatch):
    home = Path("/home/ann.smith")
    monkeypatch.setattr(report.Path, "home", lambda: home)
    monkeypatch.setattr(getpass, "getuser", lambda: "ann.smith")
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PIP_PASSWORD"):
        monkeypatch.setenv(name, f"value-of-{name}")
    text = without_secrets(
        "/home/ann.smith/runs /home/ann.smith2 /scratch/ann.smith/x value-of-HF_TOKEN, "
        "value-of-WANDB_API_KEY value-of-AWS_SECRET_ACCESS_KEY value-of-PIP_PASSWORD hf_abcdefghijklmnop https://ann:pw@host/simple"
    )
    assert text == "~/runs /home/ann.smith2 /scratch/USER/x ***, *** *** *** *** https://***@host/simple"


def test_a_report_is_without_this_environments_secrets(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", 'tok-"1234567890')  # JSON would write it otherwise
    found = whole(
        Finding("imports", "fail", f"401 for {os.environ['MY_TOKEN']} in {Path.home()}/x", "look there")
    )
    for text in (to_text(found), to_json(found)):
        assert "1234567890" not in text
        assert f"{Path.home()}/" not in text or str(Path.home()) == "/"


def test_of_other_ranks_only_what_differs_is_shown():
    free = Finding("GPU 0", "ok", "79.1 GiB free", varies=True)
    mine = {"software": [OK], "devices": [free]}
    alike = {"software": [OK], "devices": [Finding("GPU 0", "ok", "78.9 GiB free", varies=True)]}
    other = {
        "software": [Finding("torch", "ok", "2.12.0")],
        "devices": [Finding("GPU 0", "warn", "3 GiB free")],
    }
    merged = merge(mine, {1: alike, 2: other})
    assert [row.name for row in merged["software"]] == ["torch", "torch, rank 2"]
    assert [(row.name, row.status) for row in merged["devices"]] == [
        ("GPU 0", "ok"),
        ("GPU 0, rank 2", "warn"),
    ]
    assert mine == {"software": [OK], "devices": [free]}
