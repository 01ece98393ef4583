"""Folders that are there whole or not at all."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from sparse_llama.training.durable import MANIFEST, find_damage, publish, remove, write_durably


@pytest.fixture
def published(tmp_path: Path) -> Path:
    unfinished = tmp_path / ".step_000001.unfinished"
    unfinished.mkdir()
    (unfinished / "a.safetensors").write_bytes(random.Random(0).randbytes(5_000))
    (unfinished / "state.json").write_text('{"step": 1}\n', encoding="utf-8")
    publish(unfinished, tmp_path / "step_000001")
    return tmp_path / "step_000001"


def test_what_is_published_is_whole(published: Path):
    assert find_damage(published) is None
    assert [path.name for path in published.parent.iterdir()] == ["step_000001"]
    manifest = json.loads((published / MANIFEST).read_text(encoding="utf-8"))
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        "a.safetensors": 5_000,
        "state.json": 12,
    }


def test_any_flipped_bit_and_any_missing_byte_is_found(published: Path):
    """Seeded: every file, the manifest too, at many places."""
    draw, tried = random.Random(1), 0
    for path in sorted(published.iterdir()):
        whole = path.read_bytes()
        for _ in range(60):
            place = draw.randrange(len(whole))
            flipped = bytearray(whole)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            same = path.name == MANIFEST and json_equal(whole, bytes(flipped))  # a space became a tab
            assert same or find_damage(published) is not None, (path.name, place)
            path.write_bytes(whole[:place])
            assert find_damage(published) is not None, (path.name, place)
            tried += 2
        path.write_bytes(whole)
    assert tried == 360
    assert find_damage(published) is None


def json_equal(whole: bytes, other: bytes) -> bool:
    try:
        return json.loads(whole) == json.loads(other)
    except ValueError:
        return False


def test_damage_is_named(published: Path):
    (published / "a.safetensors").write_bytes(b"short")
    assert find_damage(published) == "a.safetensors has 5 bytes in place of 5,000"
    (published / "a.safetensors").unlink()
    assert find_damage(published) == "a.safetensors is missing"
    (published / MANIFEST).write_text("{", encoding="utf-8")
    assert find_damage(published) == "manifest.json is damaged"
    (published / MANIFEST).unlink()
    assert find_damage(published) == "manifest.json is missing"
    shutil.rmtree(published)
    assert find_damage(published) == "manifest.json is missing"


def test_a_manifest_cannot_make_files_elsewhere_be_read(published: Path):
    entry = {"bytes": 3, "sha256": "0"}
    (published / MANIFEST).write_text(json.dumps({"files": {"../secret": entry}}), encoding="utf-8")
    assert find_damage(published) == "manifest.json names '../secret', which is not in it"


def test_nothing_is_under_the_name_before_everything_is_on_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The order of flushes and of the rename, as the system sees them."""
    unfinished, target = tmp_path / ".one.unfinished", tmp_path / "one"
    unfinished.mkdir()
    (unfinished / "file").write_bytes(b"content")
    flushed: list[str] = []

    def flush(handle: int) -> None:
        flushed.append(
            Path(os.readlink(f"/proc/self/fd/{handle}")).name + ("" if target.exists() else " before")
        )

    monkeypatch.setattr(os, "fsync", flush)
    publish(unfinished, target)
    assert {"file before", ".one.unfinished before"} <= set(flushed)
    assert flushed.count(f"{tmp_path.name}") == 1, "the folder that has the new name is flushed after it"


def test_a_removed_folder_is_never_half_there(published: Path, monkeypatch: pytest.MonkeyPatch):
    """Deleting file by file would leave a damaged checkpoint of that name to a process that is killed."""
    monkeypatch.setattr(shutil, "rmtree", lambda *_args, **_kwargs: None)  # killed before the first file went
    remove(published)
    assert not published.exists()


def test_a_small_file_is_replaced_at_once(tmp_path: Path):
    write_durably(tmp_path / "latest", "step_000001\n")
    write_durably(tmp_path / "latest", "step_000002\n")
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "step_000002\n"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
