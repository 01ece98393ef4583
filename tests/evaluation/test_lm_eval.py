"""EleutherAI's lm-evaluation-harness on tasks of local files scores an export and an adapted model object as
``launch/evaluate.py`` does.

Where both measure the same thing: a text of whole windows (lm-eval fills a last, shorter one with context),
documents of any length under ``--partition harness``, and responses less the end of sequence, which no text
of lm-eval's has. lm-eval moves the line break at a prompt's end into the response; it is scored alone and
taken off again.

lm-eval needs ``add_bos_token=False`` for texts, or it predicts a beginning of sequence as well (one is in
front anyhow), and ``batch_size=1`` to let an adapted model generate, which takes no padding.
"""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from adapted_models import save_adapted
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from sparse_llama import cli
from sparse_llama.config.bundled import DATASETS
from sparse_llama.data.encode import encode_turns
from sparse_llama.data.records import parse_record
from sparse_llama.errors import ConfigError
from sparse_llama.export import export_merged, reopen
from sparse_llama.generation import generate_batch
from sparse_llama.model.assemble import OpenedModel, open_model

BASE = "bundled:tiny-llama"
LAYOUTS = {"v1": None, "v2": {"mode": "local_sliding_window", "block": 16, "num_sliding_window_blocks": 3}}
WINDOW, NUM_WINDOWS, NUM_RECORDS, NEW_TOKENS = 96, 4, 6, 6
DOCUMENTS = (
    " Mira lives in Oslo.\n\nShe has a cat. " * 17,
    "Tom is a baker.",
    "The pet of Ann is a donkey. \n" * 9,
)
DATA_OF = {"line_breaks": "responses", "bytes": "documents", "words": "documents"}
ROUNDING = 2e-6  # relative, of sums of fp32 losses; measured: at most 1e-7, weights of the export are folded
# lm-eval's kind of measurement, what is given, what is scored, and the number that comes out
TASKS = {
    "text": ("loglikelihood_rolling", "", "{{text}}", "bits_per_byte"),
    "bytes": ("loglikelihood_rolling", "", "{{text}}", "bits_per_byte"),
    "words": ("loglikelihood_rolling", "", "{{text}}", "word_perplexity"),
    "responses": ("loglikelihood", "{{prompt}}", "{{response}}", "perplexity"),
    "line_breaks": ("loglikelihood", "{{prompt}}", "{{''}}", "perplexity"),
    "answers": ("generate_until", "{{prompt}}", "{{response}}", "exact_match"),
}


@dataclass(frozen=True)
class Scene:
    """A folder with a trained adapter, its merged export, data and tasks; and the adapted model."""

    folder: Path
    opened: OpenedModel
    num_tokens: int
    """Of each record, up to its end of sequence."""

    def ours(self, model: str, data: str, *flags: str | int) -> dict[str, Any]:
        """Return what ``launch/evaluate.py`` finds of the ``adapter`` or the ``export``."""
        flag = "--adapter" if model == "adapter" else "--model"
        result = self.folder / "result.json"
        arguments = [flag, self.folder / model, "--data", self.folder / data, *flags, "--json", result]
        cli.main(cli.evaluate, cli.evaluate_parser("doc"), [str(argument) for argument in arguments])
        return json.loads(result.read_text(encoding="utf-8"))

    def theirs(self, model: str, tasks: list[str], **options: Any) -> dict[str, float]:
        """Return lm-eval's number for each task."""
        export = str(self.folder / "export")
        if model == "export":
            options |= {"pretrained": export, "trust_remote_code": True, "device": "cpu"}
        else:
            options |= {"pretrained": self.opened.model, "tokenizer": AutoTokenizer.from_pretrained(export)}
        manager = TaskManager(include_path=str(self.folder), include_defaults=False)
        measure: Any = lm_eval.simple_evaluate  # its decorator hides the signature
        found = measure(HFLM(**options), tasks=list(tasks), task_manager=manager, bootstrap_iters=0)
        return numbers(found["results"])


@pytest.fixture(scope="module", params=LAYOUTS)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """v1, dense, and v2, sparse."""
    folder = tmp_path_factory.mktemp(request.param)
    save_adapted(folder / "adapter", BASE, version=request.param, block=LAYOUTS[request.param])
    with pytest.MonkeyPatch.context() as patch:  # tests/export opens exports in a process of their own
        patch.setattr("sparse_llama.export.agreement.measure_elsewhere", reopen.measure_folder)
        keep_modules_in(folder / "modules", patch)
        export_merged(folder / "adapter", folder / "export")
    opened = open_model(BASE, folder / "adapter")
    text = whole_windows(opened)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    num_tokens, records = records_of_one_length(opened)
    write_rows(folder / "text.jsonl", [{"text": text}])
    write_rows(folder / "documents.jsonl", [{"text": document} for document in DOCUMENTS])
    write_rows(folder / "responses.jsonl", records)
    write_rows(folder / "answers.jsonl", half_known(opened, records))
    for name, (kind, given, wanted, metric) in TASKS.items():
        data = folder / f"{DATA_OF.get(name, name)}.jsonl"
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": given,
            "doc_to_target": wanted,
            "target_delimiter": "",
            "metric_list": [{"metric": metric}],
        }
        if kind == "generate_until":
            task["generation_kwargs"] = {"until": ["</s>"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
            steps = [{"function": "remove_whitespace"}, {"function": "take_first"}]
            task["filter_list"] = [{"name": "none", "filter": steps}]
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return Scene(folder, opened, num_tokens)


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_modules_in(tmp_path / "modules", monkeypatch)


def keep_modules_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let transformers copy an export's code to a folder of the test's, not to the user's."""
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    patch.syspath_prepend(str(folder))


def whole_windows(opened: OpenedModel) -> str:
    """Return a text of NUM_WINDOWS * WINDOW tokens."""
    text = "Mira lives in Oslo. She has a cat.\nTom is a baker.\n" * 40
    while len(opened.tokenizer.encode(text)) > NUM_WINDOWS * WINDOW:
        text = text[:-1]
    assert len(opened.tokenizer.encode(text)) == NUM_WINDOWS * WINDOW
    return text


def records_of_one_length(opened: OpenedModel) -> tuple[int, list[dict[str, str]]]:
    """Return records that ``--window`` can cut the end of sequence off, all at once: equally many tokens.

    Beside the columns of ours they have ``prompt``, the prompt with the template around it, for lm-eval.
    """
    groups: defaultdict[int, list[dict[str, str]]] = defaultdict(list)
    for line in (DATASETS["bundled:people"] / "validation.jsonl").read_text(encoding="utf-8").splitlines():
        record = {name: text for name, text in json.loads(line).items() if name != "category"}
        example = parse_record(record)
        num_tokens = len(encode_turns(example, opened.tokenizer).ids) - 1
        groups[num_tokens].append(record | {"prompt": example.prompt})
    num_tokens, records = max(groups.items(), key=lambda group: min(len(group[1]), NUM_RECORDS) * group[0])
    return num_tokens, records[:NUM_RECORDS]


def half_known(opened: OpenedModel, records: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the records, every second one with the model's own answer for its response."""
    known = generate_batch(opened.model, opened.tokenizer, [row["prompt"] for row in records], NEW_TOKENS)
    return [
        row | {"response": answer.strip()} if number % 2 else row
        for number, (row, answer) in enumerate(zip(records, known, strict=True))
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {name: result[f"{TASKS[name][3]},none"] for name, result in results.items()}


def per_record(ours: dict[str, Any]) -> float:
    return ours["nll_per_token"] * ours["tokens"] / NUM_RECORDS


def response_loss(found: dict[str, float]) -> float:
    """Return lm-eval's loss of a response in nats, averaged over records."""
    return math.log(found["responses"]) - math.log(found["line_breaks"])


@pytest.mark.parametrize("model", ["adapter", "export"])
def test_the_loss_of_a_text_is_that_of_lm_eval(scene: Scene, model: str):
    found = scene.theirs(model, ["text"], batch_size=4, max_length=WINDOW, add_bos_token=False)
    num_bytes = len((scene.folder / "text.txt").read_bytes())
    loss = found["text"] * math.log(2) * num_bytes / (NUM_WINDOWS * WINDOW)
    ours = scene.ours(model, "text.txt", "--window", WINDOW)
    assert ours["tokens"] == NUM_WINDOWS * WINDOW
    assert ours["nll_per_token"] == pytest.approx(loss, rel=ROUNDING)


@pytest.mark.parametrize("model", ["adapter", "export"])
def test_its_partition_scores_documents_of_any_length_per_word_and_per_byte(scene: Scene, model: str):
    found = scene.theirs(model, ["words", "bytes"], batch_size=1, max_length=WINDOW, add_bos_token=False)
    ours = scene.ours(model, "documents.jsonl", "--window", WINDOW, "--partition", "harness")
    lengths = [len(scene.opened.tokenizer.encode(document)) for document in DOCUMENTS]
    assert ours["tokens"] == sum(lengths)
    assert any(length % WINDOW for length in lengths if length > WINDOW)
    assert math.log(ours["word_perplexity"]) == pytest.approx(math.log(found["words"]), rel=ROUNDING)
    assert ours["bits_per_byte"] == pytest.approx(found["bytes"], rel=ROUNDING)


@pytest.mark.parametrize("model", ["adapter", "export"])
def test_the_loss_of_responses_is_that_of_lm_eval_in_padded_batches(scene: Scene, model: str):
    found = scene.theirs(model, ["responses", "line_breaks"], batch_size=4)
    ours = scene.ours(model, "responses.jsonl", "--window", scene.num_tokens)
    assert ours["records"]["truncated"] == NUM_RECORDS
    assert per_record(ours) == pytest.approx(response_loss(found), rel=ROUNDING)


@pytest.mark.parametrize("scene", ["v2"], indirect=True)
def test_these_records_are_long_enough_for_the_layout_to_matter(scene: Scene):
    measured = [
        scene.ours("adapter", "responses.jsonl", "--window", scene.num_tokens, *flag)["nll_per_token"]
        for flag in ([], ["--dense_attention"])
    ]
    assert measured[0] != pytest.approx(measured[1], rel=1e-3)


@pytest.mark.parametrize(("model", "batch_size"), [("adapter", 1), ("export", 4)])
def test_answers_are_those_that_lm_eval_generates(scene: Scene, model: str, batch_size: int):
    found = scene.theirs(model, ["answers"], batch_size=batch_size)
    ours = scene.ours(model, "answers.jsonl", "--exact_match", NUM_RECORDS, "--max_new_tokens", NEW_TOKENS)
    assert found["answers"] == ours["exact_match"]["average"] == 0.5


@pytest.mark.parametrize("scene", ["v2"], indirect=True)
def test_prompts_that_lm_eval_pads_on_the_left_are_refused_by_an_adapted_model(scene: Scene):
    with pytest.raises(ConfigError, match="batch prompts of equal length, or one at a time"):
        scene.theirs("adapter", ["answers"], batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["v2"], indirect=True)
def test_lm_evals_command_scores_an_export_with_the_code_that_it_brings(scene: Scene, tmp_path: Path):
    options = f"pretrained={scene.folder / 'export'},trust_remote_code=True"
    command = ["--model", "hf", "--model_args", options, "--device", "cpu", "--batch_size", "4"]
    tasks = ["--tasks", "responses,line_breaks,answers", "--include_path", str(scene.folder)]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command, *tasks, "--output_path", str(tmp_path / "found")],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "found").rglob("results_*.json")
    found = numbers(json.loads(path.read_text(encoding="utf-8"))["results"])
    ours = scene.ours("adapter", "responses.jsonl", "--window", scene.num_tokens)
    assert per_record(ours) == pytest.approx(response_loss(found), rel=ROUNDING)
    assert found["answers"] == 0.5
