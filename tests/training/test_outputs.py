"""What a run leaves can be read by anyone without running anything, and holds no secret of who ran it."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

SECRET = "s3cr3t-0f-m1ne"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN")


def test_a_run_leaves_tables_tensors_and_events_without_a_pickle_or_a_secret(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)
    training = {"steps": 3, "save_every": 2}
    folder = train("run", tensorboard={"enabled": True}, sparse_llama={"training": training})
    files = [path for path in folder.rglob("*") if path.is_file()]
    kinds = set()
    for path in files:
        content = path.read_bytes()
        assert SECRET.encode() not in content, path
        assert not zipfile.is_zipfile(path), path  # torch.save's
        assert not content.startswith(b"\x80"), path  # pickle's
        kinds.add(path.suffix)
        if path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".jsonl":
            assert [json.loads(line) for line in content.splitlines()]
        elif path.suffix == ".safetensors":
            assert load_file(path)
        elif path.name in ("latest", ".lock"):  # the newest checkpoint's name; nothing
            assert content.decode() == ("step_000003\n" if path.name == "latest" else "")
        else:
            assert path.name.startswith("events.out.tfevents."), path
    assert {".json", ".jsonl", ".safetensors"} < kinds
    assert SECRET not in "".join(capfd.readouterr())
