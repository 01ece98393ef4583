"""Our safetensors files are what the safetensors library writes and reads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_llama.export.shards import ShardWriter, TensorSpec

TENSORS = {
    "b.weight": torch.randn(5, 3),
    "a.bias": torch.randn(7).bfloat16(),
    "c": torch.arange(3),
    "half": torch.randn(2, 3).half(),
    "empty": torch.zeros(0, dtype=torch.int64),
}
SPECS = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def write(folder, names, **options):
    with ShardWriter(folder, SPECS, **options) as writer:
        for name in names:
            writer.write(name, TENSORS[name])


def test_one_file_has_the_bytes_of_the_library_in_any_order_of_writing(tmp_path):
    write(tmp_path, sorted(TENSORS, reverse=True))
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_and_their_index_hold_every_tensor_once(tmp_path):
    write(tmp_path, TENSORS, max_shard_bytes=64)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        tensors = load_file(path)
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        assert not tensors.keys() & found.keys()
        found |= tensors
    assert found.keys() == TENSORS.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_tensors_are_cast_to_what_was_announced(tmp_path):
    with ShardWriter(tmp_path, {"x": TensorSpec((2,), torch.bfloat16)}) as writer:
        writer.write("x", torch.tensor([1.0, 1.001], dtype=torch.float64))
    assert load_file(tmp_path / "model.safetensors")["x"].tolist() == [1.0, 1.0]


def test_a_tensor_that_was_never_written_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match=r"never written: \['a.bias'\]"):
        write(tmp_path, [name for name in TENSORS if name != "a.bias"])
