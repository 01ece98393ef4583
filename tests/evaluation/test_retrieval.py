"""Retrieval: scripted models that find everything, nothing or half of it, and what greedy decoding writes."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapted_models import save_adapted
from torch import nn

from sparse_llama import cli
from sparse_llama.config.bundled import resolve_bundled
from sparse_llama.data.tokenizer import load_tokenizer
from sparse_llama.errors import ModelError
from sparse_llama.evaluation.haystack import KINDS, Prompt, equal_depths, make_prompts
from sparse_llama.evaluation.retrieval import Cell, Retrieval, score_prompts
from sparse_llama.generation import continuation, encode_prompt
from sparse_llama.model.assemble import open_model

BASE = "bundled:tiny-llama"
LENGTHS, DEPTHS = (250, 400), equal_depths(3)
SURE = 20.0  # a logit: exp(-20) of the probability is left for the other tokens


class Reader(nn.Module):
    """A model that answers from what it has read: it sees the last ``share`` of the text, and then writes
    ``ending``."""

    def __init__(self, tokenizer: Any, *, share: float = 1.0, ending: str = ".") -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(1))
        self.tokenizer, self.share, self.ending = tokenizer, share, ending

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> SimpleNamespace:
        ids = input_ids[0].tolist()
        logits = torch.zeros(1, logits_to_keep, self.tokenizer.vocab_size)
        for row, last in enumerate(range(len(ids) - logits_to_keep + 1, len(ids) + 1)):
            logits[0, row, self.following(ids[:last])] = SURE
        return SimpleNamespace(logits=logits)

    def following(self, ids: list[int]) -> int:
        """Return the next token of the text that ``ids`` are the beginning of."""
        text = self.tokenizer.decode(ids)
        seen = text[int(len(text) * (1 - self.share)) :]
        asked = re.search(r"The secret number of (\w+) is ?\d*$", text)
        assert asked is not None
        found = re.search(rf"The secret number of {asked[1]} is (\d+)\.", seen)
        if found is None:
            return self.tokenizer.eos_id
        said = f"The secret number of {asked[1]} is {found[1]}{self.ending}"
        whole = encode_prompt(self.tokenizer, text[: asked.start()] + said)
        return whole[len(ids)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    folder = resolve_bundled(BASE)
    assert folder is not None
    return load_tokenizer(folder)


def prompts_of(tokenizer: Any, kind: Any) -> list[Prompt]:
    return make_prompts(tokenizer, kind, lengths=LENGTHS, depths=DEPTHS, trials=3, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_finds_everything_is_right_everywhere_and_sure(tokenizer, kind):
    model: Any = Reader(tokenizer)
    cells = score_prompts(model, tokenizer, prompts_of(tokenizer, kind))
    places = [(length, depth) for length in LENGTHS for depth in DEPTHS]
    assert [(cell.length, cell.depth) for cell in cells] == places
    loss = math.log1p((tokenizer.vocab_size - 1) * math.exp(-SURE))
    for cell in cells:
        assert (cell.num_trials, cell.exact) == (3, 1.0)
        assert cell.loss == pytest.approx(loss, rel=0.2)  # 2.8e-6 in fp32


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_never_answers_is_right_nowhere_and_pays_for_it(tokenizer, kind):
    model: Any = Reader(tokenizer, share=0.0)
    for cell in score_prompts(model, tokenizer, prompts_of(tokenizer, kind)):
        assert cell.exact == 0.0
        assert cell.loss == pytest.approx(SURE, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_reads_the_second_half_alone_is_right_at_the_end_alone(tokenizer, kind):
    model: Any = Reader(tokenizer, share=0.5)
    exact = [cell.exact for cell in score_prompts(model, tokenizer, prompts_of(tokenizer, kind))]
    assert (exact[0], exact[2], exact[3], exact[5]) == (0.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(("ending", "exact"), [("7.", 0.0), ("th", 0.0), (" and", 1.0), (",", 1.0)])
def test_a_number_that_goes_on_is_another_number(tokenizer, ending, exact):
    model: Any = Reader(tokenizer, ending=ending)
    for cell in score_prompts(model, tokenizer, prompts_of(tokenizer, "needle")):
        assert cell.exact == exact
        assert cell.loss < 1e-5  # of the right number's tokens


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6])
def test_right_is_what_transformers_generates_greedily(num_tokens):
    """At every length of an answer: right where a word ends there, wrong within one or with another token."""
    opened = open_model(BASE, dtype=torch.float32)
    model: Any = opened.model
    text = "Mira lives in Oslo. Tom lives in"
    ids = encode_prompt(opened.tokenizer, text)
    with torch.no_grad():
        made = model.generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False)[0, len(ids) :].tolist()
        logits = model(torch.tensor([[*ids, *made]])).logits[0, len(ids) - 1 :].double().log_softmax(-1)
    right = made[:num_tokens]
    wrong = [*right[:-1], right[-1] + 1]
    scored = [
        score_prompts(model, opened.tokenizer, [Prompt(text, "", tuple(ids), tuple(answer), 0, 0.0)])[0]
        for answer in (right, wrong)
    ]
    following = continuation(opened.tokenizer, right, made[num_tokens : num_tokens + 1])
    assert scored[0].exact == float(re.match(r"\w", following) is None)
    assert scored[1].exact == 0.0
    for cell, answer in zip(scored, (right, wrong), strict=True):
        expected = -sum(float(logits[place, token]) for place, token in enumerate(answer)) / num_tokens
        assert cell.loss == pytest.approx(expected, rel=1e-4)


def test_constant_logits_are_refused(tokenizer, tiny_llama):
    model = tiny_llama(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    model.lm_head.weight.data.zero_()
    with pytest.raises(ModelError, match="constant logits"):
        score_prompts(model, tokenizer, prompts_of(tokenizer, "needle"))


def evaluate(tmp_path: Path, *arguments: str | Path) -> dict[str, Any]:
    result = tmp_path / "result.json"
    flags = [str(argument) for argument in (*arguments, "--json", result)]
    cli.main(cli.evaluate, cli.evaluate_parser("doc"), flags)
    return json.loads(result.read_text(encoding="utf-8"))


def test_the_command_shows_writes_and_draws_every_cell(tmp_path, capsys):
    picture = tmp_path / "deep" / "map.png"
    flags = ["--lengths", "100,160", "--depths", "2", "--trials", "1", "--png", picture]
    result = evaluate(tmp_path, "--model", BASE, "--retrieval", "pairs", *flags)
    places = [(cell["length"], cell["depth"]) for cell in result["cells"]]
    assert places == [(100, 0.0), (100, 1.0), (160, 0.0), (160, 1.0)]
    assert result["loss"] == pytest.approx(sum(cell["loss"] for cell in result["cells"]) / 4)
    assert (result["model"], result["kind"], result["seed"]) == (BASE, "pairs", 42)
    assert {"versions", "device", "git_commit", "description", "attention"} <= result.keys()
    shown = capsys.readouterr().out
    assert all(f"loss {cell['loss']:.3f}" in shown for cell in result["cells"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_row_of_the_heat_map_is_a_depth_and_a_column_a_length():
    cells = [Cell(length, depth, 1, 0.0, 0.0) for length in LENGTHS for depth in DEPTHS]
    result = Retrieval("m", "pairs", "h", LENGTHS, DEPTHS, 1, 0, tuple(cells), "dense", "9", "float32", 1.0)
    places = [[(cell.depth, cell.length) for cell in row] for row in result.by_depth()]
    assert places == [[(depth, length) for length in LENGTHS] for depth in DEPTHS]


def test_sparse_attention_is_measured_as_it_was_trained_and_the_lengths_are_the_adapters(tmp_path):
    block = {"mode": "local_sliding_window", "block": 16, "num_sliding_window_blocks": 3}
    save_adapted(tmp_path / "run" / "adapter", BASE, version="v2", block=block)
    flags = ["--adapter", tmp_path / "run", "--retrieval", "needle", "--trials", "1", "--depths", "1"]
    result = evaluate(tmp_path, *flags)
    assert result["lengths"] == [128, 256]
    assert "local_sliding_window" in result["attention"]
    dense = evaluate(tmp_path, *flags, "--dense_attention")
    assert dense["cells"][1]["loss"] != pytest.approx(result["cells"][1]["loss"], rel=1e-3)


def test_a_haystack_can_be_text_of_ones_own(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Mira lives in Oslo. Tom is a baker. " * 30, encoding="utf-8")
    flags = ["--model", BASE, "--retrieval", "needle", "--lengths", "150", "--trials", "1", "--depths", "1"]
    own = evaluate(tmp_path, *flags, "--data", file)
    assert str(file) in own["haystack"]
    assert own["cells"][0]["loss"] != evaluate(tmp_path, *flags)["cells"][0]["loss"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--retrieval", "needles"], "invalid choice: 'needles'"),
        (["--retrieval", "needle", "--lengths", "a"], "--lengths: must be whole numbers above 0"),
        (
            ["--retrieval", "needle", "--lengths", "4096"],
            "--lengths: 4096 tokens are more than 2048, the m",
        ),
        (["--retrieval", "needle", "--lengths", "8"], "--lengths: 8 tokens are too few"),
        (["--retrieval", "needle", "--depths", "0"], "--depths: must be at least 1, got 0"),
        (["--retrieval", "needle", "--trials", "0"], "--trials: must be at least 1, got 0"),
        (["--retrieval", "pairs", "--data", "c4"], "--data: --retrieval pairs hides a pair among pairs"),
        (["--retrieval", "needle", "--data", "bundled:people"], "--data bundled:people: holds records"),
        (["--retrieval", "needle", "--stride", "8"], "--stride: has no part in --retrieval; leave"),
        (["--retrieval", "needle", "--exact_match", "8"], "--exact_match: has no part in --retrieval"),
        (["--data", "c4", "--trials", "8"], "--trials: belongs to --retrieval; add it"),
        (["--data", "c4", "--seed", "0"], "--seed: belongs to --retrieval; add it"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        evaluate(tmp_path, "--model", BASE, *flags)
    assert ended.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in said
