"""The ``sparse_llama`` block: what a run needs and DeepSpeed has no word for."""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from sparse_llama.config.bundled import DATASETS, MODELS
from sparse_llama.config.layers import Layers, LayoutOfLayers
from sparse_llama.config.section import FrozenList, Section, show, suggest


def check_model(name: str) -> str:
    """Return ``name`` if it can be a model's: a hub id, a path, or one of ``MODELS``.

    Raises:
        ValueError: it cannot; without a key path, which is the caller's to know.
    """
    return _check_name(name, "model", MODELS)


def check_dataset(name: str) -> str:
    """Return ``name`` if it can be a data set's; raises as ``check_model``."""
    return _check_name(name, "data set", DATASETS)


def _check_name(name: str, kind: str, bundled: Iterable[str]) -> str:
    if name.strip() == "" or not name.isprintable():
        raise ValueError(f"must be a hub id, a path or {', '.join(bundled)}, got {show(name)}")
    if name.startswith("bundled:") and name not in bundled:
        raise ValueError(f"no bundled {kind} is called {show(name)}{suggest(name, bundled)}")
    return name


ModelName = Annotated[str, AfterValidator(check_model)]
DatasetName = Annotated[str, AfterValidator(check_dataset)]


class ModelSettings(Section):
    """Which LLaMA is adapted."""

    path: ModelName = "bundled:tiny-llama"
    """A hub id, a local folder, or ``bundled:tiny-llama``."""

    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its main branch."""

    random_weights: bool = False
    """Draw the base's weights instead of loading them, and skip the checks of a loaded base; for probes and
    tests."""

    trust_remote_code: bool = False
    """Run modelling code that the model's folder brings."""


class DataSettings(Section):
    """What the run trains and validates on."""

    dataset: DatasetName = "bundled:people"
    """A hub id, a local file or folder, or ``bundled:people``."""

    validation: DatasetName | None = None
    """Another such name for validation; null is the data set's own validation split, or records split off."""

    validation_records: int | None = Field(default=None, ge=1)
    """Records to split off for validation where the data set brings no split of its own."""

    split_seed: int = Field(default=42, ge=0)
    """Which records are split off."""

    packing: bool = True
    """Fill rows with several documents; exact: each document trains as it would alone."""

    max_malformed: int = Field(default=10, ge=0)
    """Malformed records to report and skip before the run is refused."""

    max_records: int | None = Field(default=None, ge=1)
    """Training records to use at most; null is all."""


class AdapterSettings(Section):
    """What is trained."""

    version: Literal["v1", "v2"] = "v2"
    """v1: gated attention over a learned prompt. v2: also norms, and a scale and a bias on every linear
    layer."""

    prompt_length: int = Field(default=10, ge=1)
    """Prompt tokens per adapted layer."""

    start_layer: int = Field(default=2, ge=0)
    """The first layer with a prompt; the default leaves layers 0 and 1 alone."""


class AttentionSettings(Section):
    """How attention is computed; which tokens are seen is the ``sparse_attention`` block's."""

    backend: Literal["auto", "reference", "blockwise", "triton", "flex"] = "auto"
    """auto: the fastest exact one on this device."""

    master_length: int | None = Field(default=None, ge=1)
    """Tokens of the master layout that shorter rows are cropped from; null is the longer of the file's and
    the flag's ``seq_length``."""

    dense_layers: Layers | None = None
    """Layers of full attention, as numbers (negative ones from the last) or a slice such as "::4"."""

    layouts: Annotated[tuple[LayoutOfLayers, ...], FrozenList] = ()
    """Layouts of some layers in place of the ``sparse_attention`` block's; the last that names a layer
    wins."""


class TrainingSettings(Section):
    """How long the run is and how often it looks at itself. A step is an optimizer step."""

    steps: int | None = Field(default=None, ge=1)
    """Length of the run in steps; give this or ``epochs``."""

    epochs: int | None = Field(default=None, ge=1)
    """Length of the run in passes over the data; 1 where neither is given."""

    eval_every: int | None = Field(default=None, ge=1)
    """Steps between validations; null validates before and after the run only."""

    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null saves one at the end."""

    keep_last: int = Field(default=2, ge=1)
    """Checkpoints to keep."""

    samples: int = Field(default=3, ge=0)
    """Validation prompts to answer before and after the run."""

    exact_match_records: int = Field(default=0, ge=0)
    """Validation records scored by exact match, before and after; 0 is none."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens of an answer at most."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps ({self.steps}) and epochs ({self.epochs}) are both given; keep one of them"
            )
        return self


class Settings(Section):
    """The ``sparse_llama`` block."""

    seq_length: int = Field(default=512, ge=2)
    """Tokens of a row."""

    seed: int = Field(default=42, ge=0, lt=2**63)
    """Of everything that is drawn: prompts, the data's order, random blocks."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    adapter: AdapterSettings = AdapterSettings()
    attention: AttentionSettings = AttentionSettings()
    training: TrainingSettings = TrainingSettings()
