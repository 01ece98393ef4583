"""Our blocks against the installed DeepSpeed's: the same keys, the same defaults, and everything that we
accept is accepted there."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import (
    _REMOVED_TOP_LEVEL_CONFIG_KEYS,
    _REMOVED_ZERO_CONFIG_KEYS,
    DeepSpeedConfig,
    HybridEngineConfig,
)
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from deepspeed.utils import logger
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel
from torch import optim

from sparse_llama.config import deepspeed as blocks
from sparse_llama.config import optimizer as optimizers
from sparse_llama.config import schedule as schedules
from sparse_llama.config import zero
from sparse_llama.config.removed import REMOVED, UNSUPPORTED
from sparse_llama.config.run import Overrides, load_run
from sparse_llama.config.section import Section
from sparse_llama.errors import ConfigError

REFUSED = REMOVED.keys() | UNSUPPORTED.keys()
MODELS: list[tuple[str, type[Section], type[BaseModel]]] = [
    ("zero_optimization", zero.ZeroOptimization, DeepSpeedZeroConfig),
    ("zero_optimization.offload_optimizer", zero.OffloadOptimizer, DeepSpeedZeroOffloadOptimizerConfig),
    ("zero_optimization.offload_param", zero.OffloadParam, DeepSpeedZeroOffloadParamConfig),
    ("zero_optimization.leaf_module", zero.LeafModule, DeepSpeedZeroLeafModuleConfig),
    ("bf16", blocks.BF16, DeepSpeedBF16Config),
    ("fp16", blocks.FP16, DeepSpeedFP16Config),
    ("tensorboard", blocks.TensorBoard, TensorBoardConfig),
    ("wandb", blocks.Wandb, WandbConfig),
    ("csv_monitor", blocks.CSVMonitor, CSVConfig),
    ("comet", blocks.Comet, CometConfig),
    ("comms_logger", blocks.CommsLogger, CommsLoggerConfig),
    ("compile", blocks.Compile, CompileConfig),
    ("hybrid_engine", blocks.HybridEngine, HybridEngineConfig),
    ("timers.throughput", blocks.ThroughputTimer, DeepSpeedThroughputTimerConfig),
]

OTHER_DEFAULTS = {f"zero_optimization.leaf_module.{name}" for name in zero.LeafModule.model_fields} | {
    "zero_optimization.reduce_bucket_size"
}
"""Theirs of leaf_module are classes of models that are no LLaMA; a bucket is of a whole model's gradients."""


@pytest.fixture(autouse=True)
def quiet_deepspeed() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.parametrize(("path", "ours", "theirs"), MODELS, ids=[path for path, *_ in MODELS])
def test_a_block_has_the_keys_and_defaults_of_deepspeeds_class(path: str, ours, theirs):
    expected = {name: field for name, field in theirs.model_fields.items() if f"{path}.{name}" not in REFUSED}
    assert ours.model_fields.keys() == expected.keys()
    for name, field in expected.items():
        mine = ours.model_fields[name]
        assert mine.alias == field.alias, name
        if f"{path}.{name}" not in OTHER_DEFAULTS and not is_section(mine.annotation):
            assert mine.get_default() == field.get_default(), name


class Asked(dict):
    """A block that notes which of its keys somebody looks for."""

    keys_of: ClassVar[dict[str, set[str]]] = {}

    def __init__(self, path: str, held: Mapping[str, Any]) -> None:
        super().__init__(held)
        self.path = path

    def _note(self, key: str) -> None:
        Asked.keys_of.setdefault(self.path, set()).add(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # DeepSpeed asks `in block.keys()`

    def __copy__(self) -> "Asked":
        return self


LOOKED_UP: list[tuple[str, type[Section]]] = [
    ("activation_checkpointing", blocks.ActivationCheckpointing),
    ("flops_profiler", blocks.FlopsProfiler),
    ("aio", zero.AsyncIO),
    ("checkpoint", blocks.Checkpoint),
    ("checkpoint.writer", blocks.CheckpointWriter),
    ("checkpoint.parallel_write", blocks.ParallelWrite),
    ("data_types", blocks.DataTypes),
    ("torch_autocast", blocks.TorchAutocast),
    ("timers", blocks.Timers),
    ("optimizer", optimizers.Optimizer),
    ("scheduler", schedules.Scheduler),
]


@pytest.fixture(scope="module")
def looked_up() -> dict[str, set[str]]:
    """The keys that ``DeepSpeedConfig`` looks for in blocks that are no pydantic models, and at the top."""
    held: dict[str, Any] = {
        "train_batch_size": 1,
        "optimizer": Asked("optimizer", {"type": "Adam", "params": {}, "legacy_fusion": False}),
        "scheduler": Asked("scheduler", {"type": "WarmupLR", "params": {}}),
        "timers": Asked("timers", {"throughput": {}}),
        "torch_autocast": Asked("torch_autocast", {"dtype": "bf16", "lower_precision_safe_modules": []}),
        "checkpoint": Asked(
            "checkpoint",
            {
                "writer": Asked("checkpoint.writer", {}),
                "parallel_write": Asked("checkpoint.parallel_write", {}),
            },
        ),
    }
    for name in ("activation_checkpointing", "flops_profiler", "aio", "data_types"):
        held[name] = Asked(name, {})
    Asked.keys_of.clear()
    DeepSpeedConfig(Asked("", held))
    return {path: set(keys) for path, keys in Asked.keys_of.items()}


@pytest.mark.parametrize(("path", "ours"), LOOKED_UP, ids=[path for path, _ in LOOKED_UP])
def test_a_block_has_the_keys_that_deepspeed_looks_for_in_it(looked_up, path: str, ours: type[Section]):
    assert set(ours.model_fields) == looked_up[path]


def test_the_document_has_every_top_level_key_that_deepspeed_looks_for(looked_up):
    """But for those refused by name, each with a line of its own."""
    ours = set(blocks.Document.model_fields) - set(blocks.OUR_BLOCKS)
    refused = {path for path in REFUSED if "." not in path}
    theirs = looked_up[""] - {"sparse_attention"}
    assert theirs <= ours | refused
    assert ours - theirs == {"sequence_parallel_size"}  # which it looks for in a process group only
    assert {"tensor_parallel", "expert_parallel", "autotuning", "bfloat16"} <= theirs & refused


def test_every_key_that_deepspeed_removed_has_a_line_of_ours():
    removed = set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) - {"sparse_attention"}  # lives on here
    removed |= {f"zero_optimization.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS}
    assert len(removed) > 10
    assert removed <= REMOVED.keys()
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        if (field.json_schema_extra or {}).get("deprecated"):
            assert f"zero_optimization.{name}" in REMOVED


def test_the_defaults_of_blocks_that_are_no_classes_are_deepspeeds():
    ours = {name: field.get_default() for name, field in zero.AsyncIO.model_fields.items()}
    assert ours == AIO_DEFAULT_DICT
    theirs = DeepSpeedConfig({"train_batch_size": 1})
    document = {name: field.get_default() for name, field in blocks.Document.model_fields.items()}
    same = {name for name, value in document.items() if isinstance(value, bool | int | float | str)}
    same -= {"sequence_parallel_size"}  # not kept by the configuration
    assert len(same) >= 10
    for name in same:
        assert getattr(theirs, name) == document[name], name
    profiler = theirs.flops_profiler_config
    for name, field in blocks.FlopsProfiler.model_fields.items():
        assert getattr(profiler, name) == field.get_default(), name
    for name, field in blocks.ActivationCheckpointing.model_fields.items():
        assert getattr(theirs.activation_checkpointing_config, name) == field.get_default(), name


def test_scheduler_parameters_are_those_of_deepspeeds_classes():
    for name, ours in schedules.SCHEDULERS.items():
        signature = inspect.signature(getattr(lr_schedules, name))
        theirs = set(signature.parameters) - {"optimizer", "last_batch_iteration"}
        assert set(ours.model_fields) == theirs, name
        for key in theirs - {"warmup_num_steps", "warmup_max_lr", "total_num_steps"}:  # schedule.py says why
            default, field = signature.parameters[key].default, ours.model_fields[key]
            assert (
                field.is_required() if default is inspect.Parameter.empty else field.get_default() == default
            )


CLASSES: dict[str, list[type]] = {
    "AdamW": [optim.AdamW, FusedAdam, DeepSpeedCPUAdam],
    "Adam": [optim.Adam, FusedAdam, DeepSpeedCPUAdam],
    "Lion": [FusedLion, DeepSpeedCPULion],
    "Adagrad": [optim.Adagrad, DeepSpeedCPUAdagrad],
    "SGD": [optim.SGD],
}
POPPED = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
"""Parameters that DeepSpeed's engine reads and takes out before it makes the optimizer."""


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_optimizer_parameters_that_are_passed_on_are_taken_by_every_build_of_it(name: str):
    block = {key: field.get_default() for key, field in optimizers.OPTIMIZERS[name].model_fields.items()}
    params = optimizers.parse_optimizer({"type": name, "params": block})["params"]
    for build in CLASSES[name]:
        parameters = inspect.signature(build).parameters
        assert params.keys() - POPPED <= parameters.keys(), build
        for key in params.keys() - POPPED - {"lr", "weight_decay"}:
            assert params[key] == parameters[key].default, (build, key)


def leaves(section: type[Section], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the annotation of every key of a block that holds no keys itself."""
    for name, field in section.model_fields.items():
        here = f"{path}.{name}" if path else name
        inner = next(
            (part for part in (field.annotation, *get_args(field.annotation)) if is_section(part)), None
        )
        if inner is None:
            yield here, field.annotation
        else:
            yield here, {}
            yield from leaves(inner, here)


def is_section(part: object) -> bool:
    return isinstance(part, type) and issubclass(part, Section)


CANDIDATES = [
    None, True, False, 0, 1, 2, 3, 0.5, 5e8, "fp32", "bf16", "fp16", "cpu", "none", "nvme", "Fail", "mock",
    "info", "mean", "replica", "get", "/drive", "x", [], ["z3"], ["x"], {},
]  # fmt: skip
SKIPPED = ("sparse_llama", "sparse_attention", "optimizer", "scheduler")


def test_every_value_that_we_accept_is_accepted_by_deepspeed(write, monkeypatch: pytest.MonkeyPatch):
    """Every key of every block with a range of values, at every stage that accepts it; none of our own blocks
    is in what DeepSpeed gets."""
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libaio.so.1")
    accepted = refused = 0
    for path, _ in leaves(blocks.Document):
        if path.startswith(SKIPPED) or path == "zero_optimization":
            continue
        for value in CANDIDATES:
            document: Any = value
            for key in reversed(path.split(".")):
                document = {key: document}
            document = {"train_micro_batch_size_per_gpu": 2} | document
            for stage in (0, 3) if path.startswith("zero_optimization.") else (2,):
                zero_block = {"stage": stage} | document.get("zero_optimization", {})
                whole = document | {"zero_optimization": zero_block}
                try:
                    blocks.check_document(whole)  # most are refused here, before a file is written for them
                    run = load_run(write(whole), Overrides(output_dir=Path("/nonexistent/out")), 1)
                except ConfigError:
                    refused += 1
                    continue
                assert not set(blocks.OUR_BLOCKS) & run.deepspeed.keys()
                DeepSpeedConfig(dict(run.deepspeed))
                accepted += 1
    assert accepted > 500
    assert refused > 1000
