"""Layouts by layer, and GPT-NeoX's way to ask for them."""

from typing import Any

import pytest

from sparse_llama.config.layers import layer_sparsities
from sparse_llama.config.run import Overrides
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError

WINDOW = {"mode": "local_sliding_window", "block": 32, "num_sliding_window_blocks": 5}
FIXED = {"mode": "fixed", "block": 48, "attention": "unidirectional"}


def by_layer(layouts: Any, num_layers: int) -> list[str | None]:
    return [None if one is None else one.mode for one in layouts.resolve(num_layers)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([0, 2], [0, 2]),
        ([-1], [5]),
        ("::2", [0, 2, 4]),
        ("1:4", [1, 2, 3]),
        ("-2:", [4, 5]),
        (":99", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_layers_are_numbers_or_a_slice_of_pythons(load, layers, expected):
    run = load({"sparse_attention": WINDOW, "sparse_llama": {"attention": {"dense_layers": layers}}})
    dense = [index for index, mode in enumerate(by_layer(run.layouts, 6)) if mode is None]
    assert dense == expected


def test_the_last_layout_that_names_a_layer_wins_and_a_dense_layer_is_dense(load):
    attention = {
        "dense_layers": [3],
        "layouts": [
            {"layers": "1:", "sparse_attention": FIXED},
            {"layers": [-1, 3], "sparse_attention": {"mode": "bslongformer"}},
        ],
    }
    run = load({"sparse_attention": WINDOW, "sparse_llama": {"attention": attention}})
    window = "local_sliding_window"
    assert by_layer(run.layouts, 5) == [window, "fixed", "fixed", None, "bslongformer"]
    assert run.layouts.align == 96, "documents begin where blocks of 32, 48 and 16 do"


def test_layouts_need_no_block_for_the_other_layers(load):
    attention = {"layouts": [{"layers": [1], "sparse_attention": WINDOW}]}
    run = load({"sparse_llama": {"attention": attention}})
    assert by_layer(run.layouts, 3) == [None, "local_sliding_window", None]
    assert not run.layouts.is_dense
    assert load({"sparse_llama": {"attention": attention}}, attention="dense").layouts.is_dense
    assert not load({"sparse_llama": {"attention": attention}}, attention="sparse").layouts.is_dense


@pytest.mark.parametrize("layer", [6, -7])
def test_a_layer_that_the_model_has_not_is_one_line(load, layer):
    run = load({"sparse_attention": WINDOW, "sparse_llama": {"attention": {"dense_layers": [0, layer]}}})
    with pytest.raises(ConfigError) as caught:
        run.layouts.resolve(6)
    assert str(caught.value) == (
        f"sparse_llama.attention.dense_layers: there is no layer {layer} in a model of 6; use -6 to 5"
    )


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"dense_layers": "first"}, "sparse_llama.attention.dense_layers: "),
        ({"dense_layers": "::0"}, 'must be layer numbers or a slice such as "0:2" or "::4", got "::0"'),
        ({"dense_layers": []}, "sparse_llama.attention.dense_layers"),
        ({"layouts": [{"layers": [0]}]}, "sparse_attention"),
        (
            {"layouts": [{"layers": [0], "sparse_attention": {"mode": "fixd"}}]},
            "sparse_llama.attention.layouts.0.sparse_attention.mode: no mode is called 'fixd'; did you mean",
        ),
    ],
)
def test_mistakes_name_their_place(refusal, attention, message):
    line = refusal({"sparse_attention": WINDOW, "sparse_llama": {"attention": attention}})
    assert message in line
    assert "\n" not in line


def test_every_layout_has_to_fit_into_the_master(refusal):
    wide = {"layers": [0], "sparse_attention": WINDOW | {"num_sliding_window_blocks": 40}}
    line = refusal({"sparse_llama": {"seq_length": 512, "attention": {"layouts": [wide]}}})
    assert "num_sliding_window_blocks: 40 blocks of 32, but a layout of 512 tokens has 16" in line


NEOX = {
    "mode": "fixed",  # documented, and read nowhere; so is attention
    "attention": "bidirectional",
    "block": 16,
    "num_local_blocks": 8,
    "num_sliding_window_blocks": 5,
    "num_random_blocks": 2,
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sparse_fixed", {"mode": "fixed", "block": 16, "num_local_blocks": 8}),
        ("sparse_variable", {"mode": "variable", "block": 16, "num_random_blocks": 2}),
        # "local" calls its window num_local_blocks
        ("local", {"mode": "local_sliding_window", "block": 16, "num_sliding_window_blocks": 8}),
        (
            "bigbird",
            {"mode": "bigbird", "block": 16, "num_sliding_window_blocks": 5, "num_random_blocks": 2},
        ),
        ("bslongformer", {"mode": "bslongformer", "block": 16, "num_sliding_window_blocks": 5}),
    ],
)
def test_a_type_of_neox_is_the_mode_with_its_own_options_unidirectional(kind, expected):
    block = {"sparsity_config": NEOX, "attention_config": [[[kind], 2]]}
    sparsity = parse_sparsity(expected | {"attention": "unidirectional"})
    assert layer_sparsities(block).resolve(2) == (sparsity, sparsity)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("local", {"mode": "local_sliding_window", "num_sliding_window_blocks": 4}),
        ("bigbird", {"mode": "bigbird", "num_random_blocks": 1, "num_sliding_window_blocks": 3}),
        ("sparse_fixed", {"mode": "fixed", "num_local_blocks": 4, "num_global_blocks": 1}),
    ],
)
def test_neox_has_defaults_of_its_own(kind, expected):
    block = {"attention_config": [[[kind], "all"]]}
    sparsity = parse_sparsity({"block": 16, "attention": "unidirectional"} | expected)
    assert layer_sparsities(block).resolve(3) == (sparsity,) * 3


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ([[["global", "local"], 2]], [None, "local_sliding_window"] * 2),
        ([[["global"], 1], [["sparse_fixed", "bigbird"], 1]], [None, "fixed", "bigbird"]),
        ([[["flash", "sparse_fixed", "global"], "all"]], [None, "fixed", None] * 2),
        (["local", "global", "local"], ["local_sliding_window", None, "local_sliding_window"]),
    ],
)
def test_types_are_repeated_as_neox_repeats_them(config, expected):
    layouts = layer_sparsities({"sparsity_config": {}, "attention_config": config})
    assert by_layer(layouts, len(expected)) == expected


def test_neox_names_every_layer_or_none():
    layouts = layer_sparsities({"attention_config": [[["global", "local"], 6]]})
    with pytest.raises(ConfigError, match=r"names 12 layers, the model has 32; name them all, or repeat"):
        layouts.resolve(32)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"attention_config": [[["gmlp"], 2]]},
            '"gmlp" is no attention that a LLaMA has here; allowed: global',
        ),
        ({"attention_config": [[["local"], 0]]}, 'types repeat "all" or a number of times, got 0'),
        ({"attention_config": [["local", 2]]}, "must hold pairs [[types], times]"),
        ({"sparsity_config": {}}, "sparse_attention.attention_config: must be a list of types by layer"),
        (
            {"sparsity_config": {"num_local_block": 4}, "attention_config": ["local"]},
            "sparse_attention.sparsity_config.num_local_block: unknown key; did you mean 'num_local_blocks'?",
        ),
        (
            {"attention_config": ["local"], "mode": "fixed"},
            "sparse_attention.mode: does not go with sparsity_config and attention_config",
        ),
        (
            {"attention_config": [[["global"], "all"], [["local"], 2]]},
            '"all" repeats its types in every layer; leave the others out',
        ),
    ],
)
def test_mistakes_in_neoxs_block_are_one_line(refusal, block, message):
    line = refusal({"sparse_attention": block})
    assert message in line
    assert "\n" not in line


def test_an_old_file_runs_with_model_and_data_from_flags(load):
    document = {
        "train_micro_batch_size_per_gpu": 1,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "sparse_attention": {
            "sparsity_config": {"block": 16, "num_local_blocks": 32, "mode": "fixed"},
            "attention_config": [[["global", "sparse_fixed"], "all"]],
        },
    }
    run = load(document, model="openlm-research/open_llama_7b", dataset="databricks/databricks-dolly-15k")
    assert by_layer(run.layouts, 4) == [None, "fixed", None, "fixed"]
    assert run.notices == ("sparse_attention.sparsity_config: no effect of mode; GPT-NeoX reads none",)
    saved = run.to_json()
    again = layer_sparsities(saved["sparse_attention"], run.settings.attention.layouts)
    assert again.resolve(4) == run.layouts.resolve(4)
    assert Overrides().model is None
