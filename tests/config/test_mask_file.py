"""The file of a mask: what is one, what is not in one line, and that an adapter's block holds it whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_llama.config.layers import LayoutOfLayers, layer_sparsities
from sparse_llama.config.mask_file import open_mask, pack_mask
from sparse_llama.config.sparsity import MaskSparsity
from sparse_llama.errors import ConfigError

RNG = np.random.default_rng(0)


def mask(path: Path | str) -> MaskSparsity:
    return MaskSparsity(path=str(path), block=8)


def save(path: Path, table: Any) -> Path:
    np.save(path, table)
    return path


def an_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, table=np.ones((4, 4), bool))


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", lambda path: None, "no such file; name a .npy file of a bool table of blocks, (N, N) or "),
    ("folder", lambda path: path.mkdir(), "cannot be read (Is a directory); name a .npy file"),
    ("text", lambda path: path.write_text("1 0\n1 1\n"), "no .npy file; write one with numpy.save, "),
    ("empty", lambda path: path.touch(), "no .npy file; write one with numpy.save, "),
    ("archive", an_archive, "an archive; write one table with numpy.save, "),
    ("objects", lambda path: save(path, np.array([[None]])), "no .npy file; write one with numpy.save, "),
    ("numbers", lambda path: save(path, np.ones((4, 4))), "holds float64; save a bool table of blocks, "),
    ("flat", lambda path: save(path, np.ones(4, bool)), "has shape (4,); save a bool table of blocks, "),
    ("oblong", lambda path: save(path, np.ones((4, 5), bool)), "has shape (4, 5); save a bool table"),
    (
        "small",
        lambda path: save(path, np.ones((3, 3), bool)),
        "3 blocks of 8 on a side, but the layout has 4; save a larger table, or use "
        "sparse_llama.attention.master_length <= 24",
    ),
]


@pytest.mark.parametrize(
    ("write", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_what_is_no_mask_is_refused_in_one_line(
    tmp_path: Path, write: Callable[[Path], object], message: str
):
    path = tmp_path / "mask.npy"
    write(path)
    with pytest.raises(ConfigError) as refused:
        open_mask(mask(path), num_blocks=4)
    assert str(refused.value).startswith(f'sparse_attention.path: "{path}": {message}')
    assert "\n" not in str(refused.value)


def test_a_cut_file_is_refused(tmp_path: Path):
    path = save(tmp_path / "mask.npy", np.ones((40, 40), bool))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"mask.npy\": no .npy file"):
        open_mask(mask(path), num_blocks=4)


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (16, 16), (3, 9, 9)])
def test_a_packed_mask_is_the_same_when_its_file_is_gone(tmp_path: Path, shape: tuple[int, ...]):
    table = RNG.random(shape) < 0.4
    path = save(tmp_path / "mask.npy", table)
    packed = pack_mask(mask(path))
    path.unlink()
    found = open_mask(packed, num_blocks=shape[-1])
    assert found.dtype == bool
    assert np.array_equal(found, table)
    assert pack_mask(packed) == packed


def test_a_packed_window_of_a_thousand_blocks_takes_kilobytes(tmp_path: Path):
    table = np.tri(1024, dtype=bool) & ~np.tri(1024, k=-9, dtype=bool)
    packed = pack_mask(mask(save(tmp_path / "mask.npy", table)))
    assert len(packed.path) < 8 * 1024


def test_a_damaged_packed_mask_is_refused(tmp_path: Path):
    packed = pack_mask(mask(save(tmp_path / "mask.npy", np.ones((4, 4), bool))))
    for path in (packed.path[:-8], packed.path + "?", packed.path[:40] + "AAAA" + packed.path[44:]):
        with pytest.raises(ConfigError, match=r"path: a damaged mask; give a \.npy file"):
            open_mask(mask(path), num_blocks=4)


def test_masks_of_all_layers_are_packed_and_nothing_else_changes(tmp_path: Path):
    path = save(tmp_path / "mask.npy", np.tri(4, dtype=bool))
    block, window = {"mode": "mask", "path": str(path)}, {"mode": "local_sliding_window"}
    saved = layer_sparsities(block).to_json()["sparse_attention"]
    assert saved["path"] == str(path), "a run's own record names the file"
    for default, special in ((block, window), (window, block)):
        document = {"layers": "1:", "sparse_attention": special}
        layouts = layer_sparsities(default, (LayoutOfLayers.parse(document),), (2,))
        kept = layouts.packed()
        assert str(path) not in str(kept.to_json())
        assert kept.to_json()["dense_layers"] == [2]
        assert [one.mode for one in kept.distinct] == [one.mode for one in layouts.distinct]


def test_a_run_checks_its_mask_before_anything_is_loaded(tmp_path: Path, load, refusal):
    path = tmp_path / "mask.npy"
    block = {"sparse_attention": {"mode": "mask", "block": 16, "path": str(path)}}
    document = block | {"sparse_llama": {"seq_length": 100}}
    assert refusal(document).startswith(f'sparse_attention.path: "{path}": no such file; name a .npy file')
    save(path, np.tri(6, dtype=bool))
    assert "6 blocks of 16 on a side, but the layout has 7; " in refusal(document)
    save(path, np.tri(7, dtype=bool))
    assert load(document).layouts.distinct == (MaskSparsity(path=str(path)),)


def test_a_path_counts_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "mask.npy", np.tri(4, dtype=bool))
    monkeypatch.chdir(tmp_path)
    assert open_mask(mask("mask.npy"), num_blocks=4).shape == (4, 4)
