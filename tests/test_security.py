"""Nothing that a file, a folder, a name or a value brings is run, leaves its folder, or reaches a result that
it should not; each claim tried."""

import ast
import json
import os
import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from adapted_models import save_adapted
from exported_runs import BUNDLED, VOCAB_SIZE
from json_mutations import without_comments
from safetensors.torch import load_file
from shipped_documents import DOCUMENTS, load_shipped, processes_of
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama import cli
from sparse_llama.adapters.interop import FOREIGN, write_foreign
from sparse_llama.adapters.interop.ours import complete
from sparse_llama.adapters.stored import read_adapter
from sparse_llama.adapters.weights import BaseModelReference
from sparse_llama.config.run import Overrides, load_run
from sparse_llama.config.settings import DataSettings
from sparse_llama.data.ledger import Ledger
from sparse_llama.data.sources import open_source
from sparse_llama.data.split import read_examples
from sparse_llama.data.template import with_template
from sparse_llama.data.tokenizer import load_tokenizer
from sparse_llama.errors import ConfigError, SparseLlamaError
from sparse_llama.model.assemble import open_model
from sparse_llama.model.configuration import read_config
from sparse_llama.study.runs import Study
from sparse_llama.study.settings import StudySettings

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "sparse_llama").rglob("*.py"), *(ROOT / "launch").glob("*.py")])
SECRET = "s3cr3t-0f-m1ne"


class Payload:
    """A pickle of it writes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, ``model``, and an adapter of it, ``adapter``."""
    folder = tmp_path_factory.mktemp("parts")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    sizes |= {"vocab_size": VOCAB_SIZE, "num_attention_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "model")
    shutil.copy(BUNDLED / "tokenizer.model", folder / "model")
    save_adapted(folder / "adapter", str(folder / "model"), version="v1")
    return folder


@pytest.fixture
def copy(parts: Path, tmp_path: Path) -> Path:
    shutil.copytree(parts, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_payload_of_these_tests_works(tmp_path: Path):
    """Or they would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def poisons(payload: Payload) -> dict[str, Callable[[Path], object]]:
    """Return what writes a file that runs code where it is unpickled, by its format."""
    held = {"model": {"transformer.h.1.attn.gating_factor": torch.ones(1)}, "args": payload}
    return {
        "zip": lambda path: torch.save({"model.norm.weight": payload} | held, path),
        "before 1.6": lambda path: torch.save(held, path, _use_new_zipfile_serialization=False),
        "a bare pickle": lambda path: path.write_bytes(pickle.dumps(payload)),
        "protocol 0": lambda path: path.write_bytes(pickle.dumps([payload], protocol=0)),
    }


ADAPTER_FILES = (
    "lit_model.pth.adapter", "lit_model.pth.adapter_v2", "lit-llama-adapter-finetuned.pth", "adapter.pth",
    "checkpoint-1.pth", "x.pt", "x.bin", "x.ckpt", "x.adapter", "adapter_model.bin",
)  # fmt: skip


@pytest.mark.parametrize("format", ["zip", "before 1.6", "a bare pickle", "protocol 0"])
def test_no_file_of_weights_runs_the_code_in_it(format: str, copy: Path, tmp_path: Path):
    """Wherever another program's format is read."""
    ran = tmp_path / "ran"
    poison = poisons(Payload(ran))[format]
    weights = copy / "model" / "model.safetensors"
    weights.unlink()
    index = {"weight_map": {"model.norm.weight": "shard.bin"}}
    for name in ("pytorch_model.bin", "shard.bin", "model.safetensors"):
        file = copy / "model" / name
        poison(file)
        if name == "shard.bin":
            (copy / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(SparseLlamaError):
            open_model(str(copy / "model"))
        file.unlink()
    base = read_config(copy / "model")
    for name in (*ADAPTER_FILES, "adapter.safetensors"):
        folder = tmp_path / "foreign" / name.replace(".", "_")
        folder.mkdir(parents=True)
        poison(folder / name)
        if name == "adapter_model.bin":
            (folder / "adapter_config.json").write_text('{"peft_type": "ADAPTION_PROMPT"}', encoding="utf-8")
        for path in (folder, folder / name):
            with pytest.raises(SparseLlamaError):
                read_adapter(path, base, base_model=BaseModelReference(path="base"))
    assert not ran.exists()


@pytest.mark.parametrize("format", ["zip", "before 1.6", "a bare pickle"])
def test_no_other_file_that_is_read_runs_the_code_in_it(format: str, copy: Path, tmp_path: Path):
    """Masks, tokenizers, data and the kept rows of a run."""
    ran = tmp_path / "ran"
    poison = poisons(Payload(ran))[format]
    mask = {
        "train_micro_batch_size_per_gpu": 1,
        "sparse_attention": {"mode": "mask", "path": str(tmp_path / "m.npy")},
    }
    (tmp_path / "mask.json").write_text(json.dumps(mask), encoding="utf-8")
    poison(tmp_path / "m.npy")
    with pytest.raises(ConfigError, match=r"no \.npy file|an archive"):
        load_run(tmp_path / "mask.json", Overrides(output_dir=tmp_path / "out"), 1)
    np.save(tmp_path / "m.npy", np.array([Payload(ran)], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"no \.npy file"):
        load_run(tmp_path / "mask.json", Overrides(output_dir=tmp_path / "out"), 1)
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        poison(tmp_path / "tokenizer" / name)
        with pytest.raises(SparseLlamaError):
            load_tokenizer(tmp_path / "tokenizer")
        (tmp_path / "tokenizer" / name).unlink()
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.pkl", "a.pickle", "a.pt"):
        poison(tmp_path / name)
        with pytest.raises(SparseLlamaError):
            read_examples(DataSettings(dataset=str(tmp_path / name)), Ledger(64, is_packed=True))
    assert not ran.exists()


CODE = "import os\nos.mkdir(os.environ['RAN_CODE_IN'])\n"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that ``CODE`` makes where it is run."""
    monkeypatch.setenv("RAN_CODE_IN", str(tmp_path / "ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def bring_code(folder: Path) -> None:
    """Put code into a base's folder, and into its configurations that it is wanted."""
    for name in (
        "modeling_mine.py",
        "configuration_mine.py",
        "tokenization_mine.py",
        "__init__.py",
        "setup.py",
    ):
        (folder / name).write_text(CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto}), encoding="utf-8")
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.Mine"]},
        "tokenizer_class": "Mine",
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def test_code_that_a_base_brings_is_not_run_and_is_told_of(copy: Path, code: Path):
    """Unless asked: some LLaMAs bring a faster attention, and are LLaMAs all the same."""
    bring_code(copy / "model")
    with pytest.raises(SparseLlamaError, match=r"brings modelling code .* allow it with --trust_remote_code"):
        open_model(str(copy / "model"))
    opened = open_model(str(copy / "model"), copy / "adapter")
    assert any("brings modelling code" in notice and "not run" in notice for notice in opened.notices)
    with pytest.raises(SparseLlamaError) as refused:  # transformers' own tokenizer class, for its template
        with_template(load_tokenizer(copy / "model"), copy / "model", "tokenizer")
    assert "\n" not in str(refused.value)
    assert not code.exists()


def test_a_run_cannot_ask_for_code_of_its_base(tmp_path: Path):
    block = {"train_micro_batch_size_per_gpu": 1, "sparse_llama": {"model": {"trust_remote_code": True}}}
    (tmp_path / "mine.json").write_text(json.dumps(block), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trust_remote_code: true is not supported: .* code is never run"):
        load_run(tmp_path / "mine.json", Overrides(output_dir=tmp_path / "out"), 1)


def test_the_template_of_a_tokenizer_runs_nothing(copy: Path, code: Path):
    """A chat template is a program; transformers keeps it in a sandbox."""
    reach = "cycler.__init__.__globals__.os.mkdir"
    writes = f"{{% for m in messages %}}{{{{ m.content }}}}</s>{{% endfor %}}{{{{ {reach}('{code}') }}}}"
    table = {"chat_template": writes, "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    (copy / "model" / "tokenizer_config.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(SparseLlamaError, match="the chat template refuses them") as refused:
        with_template(load_tokenizer(copy / "model"), copy / "model", "tokenizer")
    assert "\n" not in str(refused.value)
    assert not code.exists()
    jinja2.Environment().from_string(writes).render(messages=[])
    assert code.exists()  # what it does outside of one


def test_code_that_a_data_set_brings_is_not_run(tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither a script of its name, nor what the library reads by a name of its own from where one stands."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(CODE, encoding="utf-8")
    (folder / "train.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", str(folder)):
        assert [found.example is not None for found in open_source(name).training] == [True]
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(Payload(code)))
    for name in ("pandas", "json", "text", "webdataset", "mine/mine.py", "data.pkl"):
        with pytest.raises(SparseLlamaError):
            list(open_source(name).training)
    assert not code.exists()


def strings_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every string in a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from strings_of(inner, (*path, key))
    if isinstance(value, str):
        yield path


SHELL = (
    "$(touch ran)",
    "`touch ran`",
    "; touch ran",
    "| touch ran",
    "x && touch ran",
    "'; touch ran #",
    "$HOME/x",
)


def test_no_value_of_a_document_is_a_word_to_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A value is what it is, or refused; and nothing here has a shell, as the next test sees to."""
    monkeypatch.chdir(tmp_path)
    for number, document in enumerate(DOCUMENTS):
        plain = without_comments(document)
        for place, path in enumerate(strings_of(plain)):
            changed: Any = json.loads(json.dumps(plain))
            block = changed
            for key in path[:-1]:
                block = block[key]
            word = SHELL[(number + place) % len(SHELL)]
            block[path[-1]] = word
            file = tmp_path / f"{word.replace('/', ' ')}.json"
            file.write_text(json.dumps(changed), encoding="utf-8")
            try:
                run = load_run(
                    file, Overrides(output_dir=tmp_path / word), processes_of(document), is_here=False
                )
            except ConfigError as error:
                assert str(error).startswith(f"{file}: ")  # noqa: PT017
            else:
                assert word in json.dumps(run.to_json(), ensure_ascii=False)
    assert not (tmp_path / "ran").exists()


UNPICKLING = (
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "read_pickle",
)  # fmt: skip
RUNNING = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path")
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_source_unpickles_evaluates_or_asks_a_shell(path: Path):
    """``torch.load`` makes tensors and plain values only; collectives of objects unpickle: there are none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            )
            assert not {name.split(".")[0] for name in names} & UNPICKLERS, names
        if isinstance(node, ast.Call):
            check_call(node, f"{path.name}, line {node.lineno}")


def check_call(call: ast.Call, where: str) -> None:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    words = {word.arg: word.value for word in call.keywords}
    values = {word: value.value for word, value in words.items() if isinstance(value, ast.Constant)}
    assert name not in RUNNING, where
    # doctor imports what pyproject.toml asks for, by name
    assert last not in UNPICKLING, where
    assert last != "import_module" or where.startswith("software.py, "), where
    assert "shell" not in words, where
    if name == "torch.load":
        assert values.get("weights_only") is True, where
    if name in ("np.load", "numpy.load"):
        assert values.get("allow_pickle") is False, where
    if name.startswith("subprocess.") and last in ("run", "Popen", "call", "check_call", "check_output"):
        assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp), where  # words, no line
    assert values.get("trust_remote_code", False) is False, where


def test_trust_in_other_peoples_code_is_off_everywhere_it_could_be_asked_for():
    parsers = [cli.evaluate_parser, cli.generate_parser]
    asked = {"--prompt": "x", "--model": "x"}
    for parser in parsers:
        known = {name for action in parser("")._actions for name in action.option_strings}
        words = [word for flag, value in asked.items() if flag in known for word in (flag, value)]
        assert parser("").parse_args(words).trust_remote_code is False


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "/x", "a/b", "a\\b", "a\0b", "", "~", "a" * 300, ".hidden", "a\nb"]
)
def test_a_variant_of_a_study_cannot_name_a_place_outside_of_it(name: str):
    with pytest.raises(ConfigError, match="cannot be a folder's name"):
        StudySettings.parse({"variants": {name: {}}, "lengths": [64]})


def test_a_studys_documents_hold_no_key_that_was_refused(tmp_path: Path):
    """They are written, and kept with the results."""
    changes = {"comet": {"enabled": True, "api_key": SECRET}}
    for settings in ({"changes": changes}, {"changes_at": {"64": changes}}):
        block = {"variants": {"one": {}}, "lengths": [64]} | settings
        study = Study("mine", StudySettings.parse(block), tmp_path, tmp_path / "out")
        with pytest.raises(ConfigError, match=r"comet.api_key: a secret has no place in a file") as refused:
            study.check()
        assert SECRET not in str(refused.value)
        assert files_with(SECRET, tmp_path) == []


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "AWS_SECRET_ACCESS_KEY")


def test_keys_of_the_environment_reach_no_description_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)
    for document in DOCUMENTS:
        assert SECRET not in json.dumps(load_shipped(document, tmp_path).to_json())


def test_keys_in_a_document_are_refused_and_not_repeated(tmp_path: Path):
    blocks: tuple[dict[str, Any], ...] = (
        {"comet": {"api_key": SECRET}},
        {"wandb": {"api_key": SECRET}},
        {"wandb": {"key": SECRET}},
        {"hf_token": SECRET},
        {"sparse_llama": {"model": {"token": SECRET}}},
        {"sparse_llama": {"model": {"path": f"https://me:{SECRET}@example.com/llama"}}},
        {"sparse_llama": {"data": {"dataset": f"https://{SECRET}@example.com/data.jsonl"}}},
        {"sparse_llama": {"data": {"validation": f"s3://me:{SECRET}@bucket/data.jsonl"}}},
    )
    for block in blocks:
        file = tmp_path / "mine.json"
        file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1} | block), encoding="utf-8")
        with pytest.raises(ConfigError) as refused:
            load_run(file, Overrides(output_dir=tmp_path / "out"), 1)
        assert SECRET not in str(refused.value)


def test_an_address_with_a_password_is_refused_without_it(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Given by a flag of any command."""
    address = f"https://me:{SECRET}@example.com/llama"
    commands: tuple[tuple[Any, Any, list[str]], ...] = (
        (cli.generate, cli.generate_parser, ["--model", address, "--prompt", "x"]),
        (cli.evaluate, cli.evaluate_parser, ["--model", address, "--data", "x.txt"]),
        (cli.evaluate, cli.evaluate_parser, ["--model", "bundled:tiny-llama", "--data", address]),
        (cli.train, cli.train_parser, ["--model", address, "--output_dir", str(tmp_path / "out")]),
        (cli.train, cli.train_parser, ["--dataset", address, "--output_dir", str(tmp_path / "out")]),
        (cli.plan_memory, cli.plan_memory_parser, ["--model", address]),
    )
    for command, parser, words in commands:
        with pytest.raises(SystemExit) as ended:
            cli.main(command, parser(""), words)
        assert ended.value.code == 2
        said = "".join(capsys.readouterr())
        assert "example.com" in said
        assert SECRET not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FOREIGN)
def test_exports_for_other_programs_hold_plain_tensors_and_json_only(
    format: str, parts: Path, tmp_path: Path
):
    base = read_config(parts / "model")
    read = read_adapter(parts / "adapter", base, base_model=BaseModelReference(path="base"))
    tensors = {
        name: one.mean().expand_as(one) if name.endswith("gate") else one
        for name, one in read.tensors.items()
    }
    settings, tensors = complete(tensors, base, source="here")
    write_foreign(format, tmp_path, settings, tensors, base, base_model="base")
    for path in tmp_path.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            load_file(path)
        else:
            assert path.name.endswith((".pth", ".adapter", ".adapter_v2"))
            assert_plain(torch.load(path, weights_only=True))
            assert (
                globals_of(path)
                <= {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | TORCH_TYPES
            )


TORCH_TYPES = {f"torch {name}Storage" for name in ("Float", "Long", "Int", "Half", "BFloat16", "Double")}


def assert_plain(value: Any) -> None:
    """Check that a value is made of tensors, tables and plain values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            assert isinstance(key, str)
            assert_plain(inner)
    else:
        assert isinstance(value, torch.Tensor | str | int | float | bool)


def globals_of(path: Path) -> set[str]:
    """Return what a pickle of torch's would import, read without importing it."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        operations = list(pickletools.genops(archive.read(name)))
    return {
        str(argument) for operation, argument, _ in operations if operation.name in ("GLOBAL", "STACK_GLOBAL")
    }
