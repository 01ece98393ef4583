"""Bases and adapters that are damaged, of something else or hostile: each opens as what it is, or is refused
in one line that names the file.

What nobody can see: a flipped bit among a base's weights, which has no checksum. It is another weight.
"""

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import save_adapted
from exported_runs import BUNDLED, VOCAB_SIZE
from fault_table import FaultsRecord
from json_mutations import damaged, flipped, mutated
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama import cli
from sparse_llama.adapters.interop import FOREIGN, write_foreign
from sparse_llama.adapters.interop.ours import complete
from sparse_llama.adapters.stored import base_of_adapter, find_adapter, read_adapter
from sparse_llama.adapters.weights import BaseModelReference
from sparse_llama.config.layers import LayerSparsities
from sparse_llama.config.settings import Settings
from sparse_llama.errors import CheckpointError, SparseLlamaError
from sparse_llama.model.assemble import assemble, open_model
from sparse_llama.model.configuration import read_config
from sparse_llama.model.llama import load_llama

AMOUNTS = [pytest.param(12, id="few"), pytest.param(1500, id="many", marks=pytest.mark.faults)]
MOST_CHARACTERS = 700  # of a line without the folder's path
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, ``model``, an adapter of it, ``adapter``, and foreign ones by format."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "model")
    shutil.copy(BUNDLED / "tokenizer.model", folder / "model")
    save_adapted(folder / "adapter", str(folder / "model"), version="v1")
    base = read_config(folder / "model")
    read = read_adapter(folder / "adapter", base, base_model=BaseModelReference(path="base"))
    # one gate for all heads, which every format can hold
    tensors = {
        name: one.mean().expand_as(one) if name.endswith("gate") else one
        for name, one in read.tensors.items()
    }
    settings, tensors = complete(tensors, base, source="here")
    for format in FOREIGN:
        (folder / format).mkdir()
        write_foreign(format, folder / format, settings, tensors, base, base_model=str(folder / "model"))
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder to be damaged."""
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def is_refused(action: Callable[[], object], folder: Path) -> bool:
    """Return whether ``action`` is refused, in one line about something in ``folder``."""
    try:
        action()
    except SparseLlamaError as error:
        said = str(error)
        assert str(folder) in said, said
        line = said.replace(str(folder), "*")
        assert line.isprintable(), line
        assert len(line) < MOST_CHARACTERS, line
        return True
    return False


def open_adapter(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter, read as ``--adapter`` and ``import_adapter`` do."""
    config = read_config(folder / "model")
    source = find_adapter(folder / name)
    base_of_adapter(source)
    return read_adapter(source, config, base_model=BaseModelReference(path="base")).tensors


def headers(content: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file whose header says something else."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.randrange(9)
    if kind == 0:
        lengths = (0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1)
        return struct.pack("<Q", rng.choice(lengths)) + content[8:]
    if kind == 1:
        return struct.pack("<Q", length) + rng.randbytes(length) + data
    if kind == 2:
        return content[: rng.randrange(len(content))]
    if kind == 3:
        return flipped(content, rng, num_flips=rng.choice((1, 3)), last=8 + length)
    if kind == 4:
        begin, end = header[name]["data_offsets"]
        offsets = (
            [end, begin],
            [begin, end + 8],
            [begin - 8, end],
            [0, 2**63],
            [begin, 2**70],
            ["a", 1],
            [begin],
        )
        header[name]["data_offsets"] = rng.choice(offsets)
    elif kind == 5:
        header[name]["shape"] = rng.choice(
            ([], [-1], [2**62, 2**62], [0], "x", [1.5], header[name]["shape"] * 2)
        )
    elif kind == 6:
        header[name]["dtype"] = rng.choice(("F64", "I8", "BOOL", "F8_E4M3", "X", 3, "BF16"))
    elif kind == 7:
        header[rng.choice(("", "x", "\u2603", "a" * 5000, "\x1b[2J"))] = header.pop(name)
    else:
        text = mutated(header, rng).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def contents(tensors: dict[str, torch.Tensor]) -> list[bytes]:
    """Return the bytes of all tensors, whatever they are called: two names that change places are another
    model, which nobody can tell from the file."""
    return sorted(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values())


@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_base_whose_header_says_something_else_is_refused(
    amount: int, copy: Path, faults_record: FaultsRecord
):
    """Before the model takes memory; and no tensor is ever other bytes of the file."""
    rng, path = random.Random(40), copy / "model" / "model.safetensors"
    content, expected = path.read_bytes(), contents(load_file(path))
    num_refused = 0
    for _ in range(amount):
        path.write_bytes(headers(content, rng))
        loaded: list[LlamaForCausalLM] = []
        model = str(copy / "model")
        refused = is_refused(lambda: loaded.append(load_llama(model, dtype=torch.float32).model), copy)  # noqa: B023
        num_refused += refused
        assert refused or contents(dict(loaded[0].named_parameters())) == expected
    assert num_refused > amount / 2
    faults_record("base: header of safetensors", injected=amount, survived=amount)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_an_adapter_whose_header_says_something_else_is_refused(
    amount: int, copy: Path, faults_record: FaultsRecord
):
    rng, path = random.Random(41), copy / "adapter" / "adapter.safetensors"
    content, expected = path.read_bytes(), contents(load_file(path))
    num_refused = 0
    for _ in range(amount):
        path.write_bytes(headers(content, rng))
        read: list[dict[str, torch.Tensor]] = []
        refused = is_refused(lambda: read.append(open_adapter(copy)), copy)  # noqa: B023
        num_refused += refused
        assert refused or contents(read[0]) == expected
    assert num_refused > amount / 2
    faults_record("adapter: header of safetensors", injected=amount, survived=amount)


JSON_FILES = {
    "model/config.json": lambda folder: read_config(folder / "model"),
    "adapter/adapter_config.json": lambda folder: open_adapter(folder),
    "peft/adapter_config.json": lambda folder: open_adapter(folder, "peft"),
}


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("name", JSON_FILES)
def test_a_changed_configuration_is_read_or_refused(
    name: str, amount: int, copy: Path, faults_record: FaultsRecord
):
    """And what is read is a model that can be made: transformers takes 2**31 layers, and makes them."""
    rng, path = random.Random(42), copy / name
    text = path.read_text(encoding="utf-8")
    num_refused = 0
    for number in range(amount):
        changed = mutated(json.loads(text), rng).encode("utf-8", "surrogatepass")
        path.write_bytes(changed if number % 3 else damaged(text, rng))
        made: list[Any] = []
        refused = is_refused(lambda: made.append(JSON_FILES[name](copy)), copy)  # noqa: B023
        num_refused += refused
        if not refused and isinstance(made[0], LlamaConfig) and _num_elements(made[0]) < 10**7:
            LlamaForCausalLM(made[0])(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert num_refused > 0
    faults_record(f"configuration of a model: {name}", injected=amount, survived=amount)


def _num_elements(config: LlamaConfig) -> int:
    width = config.hidden_size * (config.intermediate_size + config.hidden_size)
    return config.vocab_size * config.hidden_size + config.num_hidden_layers * width * 4


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("format", FOREIGN)
def test_a_damaged_adapter_of_another_program_is_read_or_refused(
    format: str, amount: int, copy: Path, faults_record: FaultsRecord
):
    """Whatever its bytes spell: half of these formats are pickles, of which only tensors and plain values are
    made."""
    rng = random.Random(43)
    path = next(file for file in (copy / format).iterdir() if file.suffix != ".json")
    content = path.read_bytes()
    num_refused = 0
    for number in range(amount):
        if path.suffix == ".safetensors" and number % 2:
            path.write_bytes(headers(content, rng))
        elif number % 3:
            path.write_bytes(flipped(content, rng, num_flips=rng.choice((1, 5, 50))))
        else:
            path.write_bytes(rng.choice((content[: rng.randrange(len(content))], rng.randbytes(300), b"")))
        num_refused += is_refused(lambda: open_adapter(copy, format), copy)
    assert num_refused > 0
    faults_record(f"adapter of {format}: bytes", injected=amount, survived=amount)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("format", FOREIGN)
def test_an_adapter_of_another_program_with_other_tensors_is_read_or_refused(
    format: str, amount: int, copy: Path, faults_record: FaultsRecord
):
    rng = random.Random(44)
    path = next(file for file in (copy / format).iterdir() if file.suffix != ".json")
    is_safe = path.suffix == ".safetensors"
    held: Any = load_file(path) if is_safe else torch.load(path, weights_only=True)
    nested = not is_safe and isinstance(held.get("model"), dict)
    num_refused = 0
    for _ in range(amount):
        tensors = {name: one.clone() for name, one in (held["model"] if nested else held).items()}
        for _ in range(rng.choice((1, 1, 2))):
            change_tensors(tensors, rng)
        if is_safe:
            save_file(tensors, path)
        else:
            torch.save(held | {"model": tensors} if nested else tensors, path)
        num_refused += is_refused(lambda: open_adapter(copy, format), copy)
    assert num_refused > amount / 2
    faults_record(f"adapter of {format}: tensors", injected=amount, survived=amount)


def change_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """Make of an adapter's tensors others: by name, shape, type or value."""
    if not tensors:
        return
    name = rng.choice(list(tensors))
    one = tensors[name]
    kind = rng.randrange(10)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        other = re.sub(r"\d+", str(rng.choice((0, 7, 999, 10**20))), name, count=1)
        tensors[rng.choice((other, f"{name}x", "", "\u2603", name.upper()))] = tensors.pop(name)
    elif kind == 2:
        shapes: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3, 0), (1, 1, 1, 1, 1), (*one.shape, 2), (7,))
        tensors[name] = torch.ones(rng.choice(shapes))
    elif kind == 3:
        tensors[name] = one.flatten()
    elif kind == 4:
        tensors[name] = one[..., :-1].contiguous() if one.dim() else one
    elif kind == 5:
        tensors[name] = one.to(
            rng.choice((torch.int8, torch.int64, torch.bool, torch.float64, torch.bfloat16))
        )
    elif kind == 6 and one.is_floating_point():
        tensors[name] = torch.full_like(one, rng.choice((float("nan"), float("inf"))))
    elif kind == 7:
        tensors["model.extra.weight"] = torch.ones(2)
    elif kind == 8:
        tensors[name] = torch.cat([one, one]) if one.dim() else one
    else:
        tensors[name] = torch.zeros_like(one)


def _write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _index(folder: Path, *files: object) -> None:
    """Make shards of a base that its index says are ``files``."""
    tensors = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    for number, name in enumerate(("a.safetensors", "../b.safetensors")):
        save_file(dict(list(tensors.items())[number::2]), folder / "model" / name)
    names = [files[number % len(files)] for number in range(len(tensors))]
    weight_map = dict(zip([*list(tensors)[::2], *list(tensors)[1::2]], sorted(names, key=str), strict=True))
    _write(folder / "model" / "model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def _change(path: Path, **changes: Any) -> None:
    _write(path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


def _cast(path: Path, **changes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {name: one.clone() for name, one in load_file(path).items()}
    for ending, change in changes.items():
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = change(tensors[name])
    save_file(tensors, path)


BROKEN_BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: shutil.rmtree(f / "model"), "no such folder"),
    "no weights": (lambda f: (f / "model" / "model.safetensors").unlink(), "no weights; expected model.saf"),
    "no configuration": (lambda f: (f / "model" / "config.json").unlink(), "no config.json"),
    "no tokenizer": (lambda f: (f / "model" / "tokenizer.model").unlink(), "no tokenizer; expected tok"),
    "a tokenizer cut short": (
        lambda f: _write(f / "model" / "tokenizer.model", (BUNDLED / "tokenizer.model").read_bytes()[:999]),
        "tokenizer.model: not a SentencePiece model",
    ),
    "another program's tokenizer": (
        lambda f: _write(f / "model" / "tokenizer.model", "version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.model: not a SentencePiece model",
    ),
    "a smaller vocabulary than the tokenizer's": (
        lambda f: (
            _change(f / "model" / "config.json", vocab_size=1000),
            _cast(f / "model" / "model.safetensors", **{"head.weight": _short, "tokens.weight": _short}),
        ),
        r"tokenizer: has 1344 tokens, the model's vocabulary is 1000",
    ),
    "weights of integers": (
        lambda f: _cast(f / "model" / "model.safetensors", **{"head.weight": lambda one: one.to(torch.int8)}),
        "lm_head.weight is int8; a base's weights are",
    ),
    "heads that do not divide": (
        lambda f: _change(f / "model" / "config.json", num_attention_heads=4, num_key_value_heads=3),
        r"num_attention_heads \(4\) is no multiple of num_key_value_heads \(3\)",
    ),
    "other widths": (
        lambda f: _change(f / "model" / "config.json", intermediate_size=32),
        r"has shape \[16, 24\], config.json says \[16, 32\]",
    ),
    "more layers than there are": (
        lambda f: _change(f / "model" / "config.json", num_hidden_layers=9),
        "tensors missing",
    ),
    "layers beyond reason": (
        lambda f: _change(f / "model" / "config.json", num_hidden_layers=2**31),
        "num_hidden_layers: must be <= 4096, got 2147483648",
    ),
    "another architecture": (
        lambda f: _change(f / "model" / "config.json", model_type="mistral"),
        "model_type is 'mistral'; only \"llama\"",
    ),
    "a shard elsewhere": (
        lambda f: _index(f, "a.safetensors", "../b.safetensors"),
        "names a shard '../b.saf",
    ),
    "a shard by its whole path": (
        lambda f: _index(f, "a.safetensors", str(f / "b.safetensors")),
        "names a shard '.* that is not beside it",
    ),
    "a shard that is a number": (lambda f: _index(f, 3), "not an index of shards"),
    "a shard that is missing": (
        lambda f: _index(f, "a.safetensors", "b.safetensors"),
        r"1 of 2 shards are missing \(first b.safetensors\)",
    ),
    "an index that is none": (
        lambda f: (
            (f / "model" / "model.safetensors").unlink(),
            _write(f / "model" / "model.safetensors.index.json", "[" * 100_000),
        ),
        r"index.json: not JSON \(maximum recursion",
    ),
}


def _short(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1000].contiguous()


@pytest.mark.parametrize("name", BROKEN_BASES)
def test_a_broken_base_is_refused_with_its_file(name: str, copy: Path, faults_record: FaultsRecord):
    spoil, said = BROKEN_BASES[name]
    spoil(copy)
    with pytest.raises(SparseLlamaError, match=said) as refused:
        open_model(str(copy / "model"))
    assert "\n" not in str(refused.value)
    faults_record("base: a broken folder", injected=1, survived=1)


BROKEN_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tensors": (lambda f: (f / "adapter" / "adapter.safetensors").unlink(), "no adapter.safetensors"),
    "no configuration": (
        lambda f: (f / "adapter" / "adapter_config.json").unlink(),
        "no adapter_config.json; an adapter folder holds",
    ),
    "another version": (
        lambda f: _change(f / "adapter" / "adapter_config.json", format_version=2),
        r"format_version 2 is not one this version reads \(1\); update",
    ),
    "another variant": (
        lambda f: _change(
            f / "adapter" / "adapter_config.json",
            adapter={"version": "v1", "prompt_length": 4, "start_layer": 1},
        ),
        r"has shape \[3, 16\], this base needs \[4, 16\]",
    ),
    "a length beyond reason": (
        lambda f: _change(f / "adapter" / "adapter_config.json", master_length=2**40),
        "master_length: must be <= 134217728",
    ),
    "of a wider base": (
        lambda f: _change(f / "model" / "config.json", hidden_size=32),
        r"has shape \[3, 16\], this base needs \[3, 32\]; it was trained on another base",
    ),
    "of a shallower base": (
        lambda f: _change(f / "model" / "config.json", num_hidden_layers=4),
        "2 missing .* it was trained with other adapter settings or on another base",
    ),
    "tensors of another type": (
        lambda f: _cast(f / "adapter" / "adapter.safetensors", gate=lambda one: one.half()),
        "gate is float16, an adapter's tensors are float32",
    ),
    "a tensor that is no number": (
        lambda f: _cast(f / "adapter" / "adapter.safetensors", gate=lambda one: one / 0),
        "gate holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_a_broken_adapter_is_refused_before_its_base_is_loaded(
    name: str, copy: Path, faults_record: FaultsRecord
):
    """The base's weights are gone: who looks for them first would say so."""
    (copy / "model" / "model.safetensors").unlink()
    spoil, said = BROKEN_ADAPTERS[name]
    spoil(copy)
    with pytest.raises(SparseLlamaError, match=said) as refused:
        open_model(str(copy / "model"), copy / "adapter")
    assert "\n" not in str(refused.value)
    faults_record("adapter: a broken folder", injected=1, survived=1)


def test_every_command_refuses_a_damaged_adapter_in_one_line(
    copy: Path, faults_record: FaultsRecord, capsys: pytest.CaptureFixture[str]
):
    """Evaluation, generation, both exports and a run that trains on from it."""
    path = copy / "adapter" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    adapter, out = str(copy / "adapter"), str(copy / "out")
    commands: list[tuple[Any, Any, list[str]]] = [
        (cli.evaluate, cli.evaluate_parser, ["--adapter", adapter, "--data", "bundled:people"]),
        (cli.generate, cli.generate_parser, ["--adapter", adapter, "--prompt", "Who?"]),
        (cli.export, cli.export_parser, ["--checkpoint", adapter, "--output", out]),
        (cli.export, cli.export_parser, ["--checkpoint", adapter, "--output", out, "--format", "native"]),
    ]
    for command, parser, arguments in commands:
        with pytest.raises(SystemExit) as ended:
            cli.main(command, parser(""), arguments)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert "adapter.safetensors: not a complete safetensors file" in said
    assert not (copy / "out").exists()
    settings = Settings.parse({"training": {"init_adapter": adapter}, "model": {"path": str(copy / "model")}})
    settings = settings.model_copy(update={"seq_length": 32})
    with pytest.raises(CheckpointError, match=r"init_adapter: .*not a complete safetensors file"):
        assemble(settings, LayerSparsities(None), dtype=torch.float32)
    faults_record("adapter: given to every command", injected=5, survived=5)
