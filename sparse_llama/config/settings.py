"""The ``sparse_llama`` block: what a run needs and DeepSpeed has no word for."""

from collections.abc import Iterable
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from sparse_llama.config.bundled import DATASETS, MODELS
from sparse_llama.config.layers import Layers, LayoutOfLayers
from sparse_llama.config.paths import is_url, without_secrets
from sparse_llama.config.rope import RopeParameters
from sparse_llama.config.section import FrozenList, Section, either, only, show, suggest


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
    if is_url(name):
        raise ValueError(
            f"{show(without_secrets(name))} is an address; give a hub id, a path or {', '.join(bundled)}, "
            "and a token in the environment (HF_TOKEN)"
        )
    if name.startswith("bundled:") and name not in bundled:
        raise ValueError(f"no bundled {kind} is called {show(name)}{suggest(name, bundled)}")
    return name


MOST_TOKENS = 2**27
"""Of a row: beyond it, positions and offsets would be the limit, and the layout alone would fill a host."""
TemplateName = Literal["alpaca", "tokenizer"]
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

    trust_remote_code: Annotated[
        bool, only(False, "adapters go onto transformers' own LLaMA, and a folder's code is never run")
    ] = False
    """Whether modelling code that the model's folder brings is run: never in training."""

    rope_parameters: RopeParameters | None = None
    """How positions turn; null is as the base's configuration says. Needed where ``seq_length`` is longer
    than the base was made for: rows may be one document, so packing does not count."""


class DataSettings(Section):
    """What the run trains and validates on."""

    dataset: DatasetName = "bundled:people"
    """A hub id, a local file or folder, or ``bundled:people``."""

    validation: DatasetName | None = None
    """Another such name for validation; null is the data set's own validation split, or records split off."""

    training_split: str | None = Field(default=None, min_length=1)
    """Split of a hub data set, or files of a folder by name without ending, to train on; null is the one that
    is called train."""

    validation_split: str | None = Field(default=None, min_length=1)
    """The same to validate on, of ``validation`` where that is given; null is the one called validation, or
    test."""

    validation_records: int | None = Field(default=None, ge=1)
    """Records to split off for validation where the data set brings no split of its own."""

    split_seed: int = Field(default=42, ge=0)
    """Which records are split off."""

    template: TemplateName = "alpaca"
    """What stands around questions and answers: Stanford Alpaca's text, or the tokenizer's chat template."""

    packing: bool = True
    """Fill rows with several documents; exact: each document trains as it would alone."""

    group_by_length: bool = False
    """Without packing: sort the rows of a step by length before it is cut into micro-batches, which pads
    less. A step's rows stay what they are."""

    cache: bool = True
    """Keep tokenised rows on disk, for the next start with the same records, tokenizer and lengths."""

    cache_dir: str | None = Field(default=None, min_length=1)
    """Folder of these rows; null is SPARSE_LLAMA_CACHE of the environment, else sparse-llama in the user's
    cache folder. Whatever is in it can be deleted at any time."""

    max_malformed: int = Field(default=10, ge=0)
    """Malformed records to report and skip before the run is refused."""

    max_records: int | None = Field(default=None, ge=1)
    """Training records to use at most; null is all."""

    @model_validator(mode="after")
    def _two_splits(self) -> Self:
        split = self.validation_split
        if split is not None and split == self.training_split and self.validation is None:
            raise ValueError(
                f"training_split and validation_split are both {show(split)}; name two, or leave "
                "validation_split out to hold records back"
            )
        return self


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
_Projections = Annotated[
    bool | Annotated[tuple[Projection, ...], FrozenList] | None,
    either(f"true, false, or a list of {', '.join(PROJECTIONS)}"),
]


class AdapterSettings(Section):
    """What is trained. The four parts of v2 can be taken out one by one; null is what the version has."""

    version: Literal["v1", "v2"] = "v2"
    """v1: gated attention over a learned prompt. v2: also norms, and a scale and a bias on every linear
    layer."""

    prompt_length: int = Field(default=10, ge=1)
    """Prompt tokens per adapted layer."""

    start_layer: int | None = Field(default=None, ge=0)
    """The first layer with a prompt; null is 2, or what ``top_layers`` says. v2's other parts are in every
    layer."""

    top_layers: int | None = Field(default=None, ge=1)
    """Adapt the last so many layers only, with all that the version has: nothing below them needs a backward
    pass."""

    gate: Literal["per_head", "scalar"] = "per_head"
    """One gate per query head, or one per layer."""

    gate_activation: Literal["none", "tanh"] = "none"
    """What a gate goes through before it multiplies."""

    scale: _Projections = None
    """Linear layers whose outputs are scaled."""

    bias: _Projections = None
    """Linear layers whose outputs get a bias before they are scaled."""

    norm: bool | None = None
    """Whether the norms train."""

    lm_head: Annotated[bool | Literal["scale", "bias"] | None, either('true, false, "scale" or "bias"')] = (
        None
    )
    """Whether the head has what other linear layers have, or only one of the two; null is true in v2."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.start_layer is not None and self.top_layers is not None:
            raise ValueError(
                f"start_layer ({self.start_layer}) and top_layers ({self.top_layers}) are both given; keep "
                "one of them"
            )
        if self.version == "v1":
            for name in ("scale", "bias", "norm", "lm_head"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is {show(getattr(self, name))}, but version v1 has prompts and gates only; "
                        "use version v2 or leave it out"
                    )
        return self

    @property
    def trains_norms(self) -> bool:
        """Whether the norms train: those of the adapted layers and the last one."""
        return self.version == "v2" and self.norm is not False

    @property
    def scaled(self) -> frozenset[str]:
        """The linear layers with a scale, by the last part of their names; ``lm_head`` is one."""
        return self._with(self.scale, "scale")

    @property
    def biased(self) -> frozenset[str]:
        """The linear layers with a bias of the adapter's."""
        return self._with(self.bias, "bias")

    def prompt_layers(self, num_layers: int) -> range:
        """Return the layers with a prompt, in a model of ``num_layers``; empty where none is left."""
        if self.top_layers is not None:
            return range(max(num_layers - self.top_layers, 0), num_layers)
        return range(2 if self.start_layer is None else self.start_layer, num_layers)

    def adapted_layers(self, num_layers: int) -> range:
        """Return the layers with any part of the adapter."""
        if self.version == "v1" or self.top_layers is not None:
            return self.prompt_layers(num_layers)
        return range(num_layers)

    def _with(self, chosen: bool | tuple[Projection, ...] | None, part: str) -> frozenset[str]:
        if self.version == "v1":
            return frozenset()
        names: set[str] = set(PROJECTIONS if chosen is None or chosen is True else chosen or ())
        if self.lm_head == part or (self.lm_head in (None, True) and names):
            names.add("lm_head")
        return frozenset(names)


class MemorySettings(Section):
    """Where the memory of a training step goes, at the price of time. None of it changes what is computed.

    Checkpointed layers, and inputs of theirs in host memory, are DeepSpeed's ``activation_checkpointing``
    block's; weights and optimizer, ``zero_optimization``'s.
    """

    loss_tile: int | None = Field(default=None, ge=1)
    """Labelled tokens whose logits exist at a time; null is all of a micro-batch."""

    mlp_tile: int | None = Field(default=None, ge=1)
    """Tokens that go through a layer's MLP at a time; null is all of a micro-batch."""

    norm_tile: int | None = Field(default=None, ge=1)
    """Tokens that go through a norm at a time; null is all of a micro-batch."""

    head_groups: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)] | None, either('an integer >= 1 or "auto"')
    ] = None
    """Compute each decoder layer as one function of three passes, with the attention of this many groups of
    heads one after the other; null is transformers' layer, "auto" the fewest groups with which the run is
    planned to fit, and null where it fits without."""

    checkpoint_nvme_path: str | None = None
    """Folder on a drive that layer inputs move on to from host memory; null keeps them there."""

    @property
    def num_head_groups(self) -> int | None:
        """``head_groups`` once a plan has settled it."""
        assert self.head_groups != "auto", "a run is settled (planning.quick) before anything is made of it"
        return self.head_groups


class AttentionSettings(Section):
    """How attention is computed; which tokens are seen is the ``sparse_attention`` block's."""

    backend: Literal["auto", "reference", "blockwise", "triton", "flex"] = "auto"
    """auto: the fastest exact one on this device."""

    master_length: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
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
    """Newest checkpoints to keep."""

    keep_best: int = Field(default=0, ge=0)
    """Checkpoints to keep beside these: those with the lowest validation losses. Needs a validation at every
    save."""

    time_budget_s: float | None = Field(default=None, gt=0)
    """Seconds from the start of the program by which it must have saved and ended; null is no limit. A run
    that is not done by then goes on with ``--resume``, which has as long again."""

    diverged_patience: int = Field(default=3, ge=1)
    """Steps in a row whose loss is no number, or worse than guessing, before the run stops."""

    init_adapter: str | None = None
    """An adapter to train on from, of this or another program; the run's variant is then its own."""

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

    @model_validator(mode="after")
    def _best_is_known(self) -> Self:
        saved, looked = self.save_every, self.eval_every
        if self.keep_best and (saved is None or looked is None or saved % looked != 0):
            raise ValueError(
                f"keep_best is {self.keep_best}, save_every {show(saved)} and eval_every {show(looked)}: "
                "the best are known where each save follows a validation; make save_every a multiple of it"
            )
        return self


class Settings(Section):
    """The ``sparse_llama`` block."""

    seq_length: int = Field(default=512, ge=2, le=MOST_TOKENS)
    """Tokens of a row."""

    seed: int = Field(default=42, ge=0, lt=2**63)
    """Of everything that is drawn: prompts, the data's order, random blocks."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    adapter: AdapterSettings = AdapterSettings()
    attention: AttentionSettings = AttentionSettings()
    memory: MemorySettings = MemorySettings()
    training: TrainingSettings = TrainingSettings()
