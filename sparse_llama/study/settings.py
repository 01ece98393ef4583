"""A study's document: which runs, and what each is measured on.

Every run is the document of ``ds_config`` with ``changes`` in it, then its variant's, then its length's, and
that and its seed: the same data and hyperparameters but for what is compared.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparse_llama.config.document import read_document
from sparse_llama.config.section import FrozenList, Section, quote, suggest
from sparse_llama.errors import ConfigError

Names = Annotated[tuple[str, ...], FrozenList]
Lengths = Annotated[tuple[Annotated[int, Field(ge=2)], ...], FrozenList]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], FrozenList]
Changes = dict[str, Any]
"""A part of a run's document; null takes a key out."""
MOST_BYTES = 80
"""Of a variant's name, which folders and files are named by."""

EQUAL_STEPS: Literal["equal_steps"] = "equal_steps"
EQUAL_TIME: Literal["equal_time"] = "equal_time"


class RetrievalSettings(Section):
    """Facts hidden in text, asked for at its end."""

    kind: Literal["needle", "pairs"] = "needle"
    """One sentence in other text, or one of many pairs of key and value."""

    lengths: Lengths = ()
    """Tokens of a prompt; none is the run's own length."""

    depths: int = Field(default=5, ge=1)
    """Places from the beginning to the end of the text."""

    trials: int = Field(default=4, ge=1)
    """Prompts at each length and depth."""


class EvaluationSettings(Section):
    """What the base and every run are measured on, after training."""

    texts: Names = ()
    """Of perplexity: ``wikitext2``, ``ptb``, ``c4``, or files."""

    records: int = Field(default=0, ge=0)
    """Validation records to answer, compared whole and by their longest common subsequence; 0 is none."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens of an answer at most."""

    prompts: Names = ()
    """Instructions that the base and every run answer, for the reader to compare."""

    retrieval: RetrievalSettings | None = None


class Variant(Section):
    """One of what is compared."""

    ds_config: str | None = None
    """Its document, where that is not the study's."""

    changes: Changes = {}
    """What it has in place of that and of the study's changes."""

    reference: str | None = None
    """The variant that it is compared with; null is the study's."""


class StudySettings(Section):
    """The document of a study."""

    ds_config: str | None = None
    """The runs' document, relative to the study's own; null is the embedded demo."""

    changes: Changes = {}
    """What every run has in place of that."""

    variants: dict[str, Variant] = Field(min_length=1)
    """What is compared, by name."""

    lengths: Lengths = Field(min_length=1)
    """Tokens of a row."""

    changes_at: dict[str, Changes] = {}
    """What the runs of a length have in place of all that, by the length."""

    seeds: Seeds = Field(default=(42,), min_length=1)

    compare: Annotated[tuple[Literal["equal_steps", "equal_time"], ...], FrozenList] = Field(
        default=(EQUAL_STEPS,), min_length=1
    )
    """equal_time adds a run of each variant as long as ``reference`` takes."""

    reference: str | None = None
    """The variant that others are compared with; null is none where a variant names its own, else the
    first."""

    evaluation: EvaluationSettings = EvaluationSettings()

    corrected: dict[str, str] = {}
    """For a study that repeats another: what that did, and what is done here instead."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("lengths", "seeds", "compare"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {list(values)} names one twice; keep one of them")
        for length in self.changes_at:
            if length not in map(str, self.lengths):
                raise ValueError(f"changes_at: {quote(length)} is none of the lengths, {list(self.lengths)}")
        for name in (self.reference, *(variant.reference for variant in self.variants.values())):
            if name is not None and name not in self.variants:
                hint = suggest(name, self.variants)
                raise ValueError(f"reference: no variant is called {quote(name)}{hint}")
        for name in self.variants:
            is_plain = all(letter.isalnum() or letter in "-_.+" for letter in name) and name[:1] not in (
                "",
                ".",
            )
            if not is_plain or len(name.encode()) > MOST_BYTES:
                raise ValueError(
                    f"variants: {quote(name)} cannot be a folder's name; use at most {MOST_BYTES} bytes of "
                    "letters, digits, - and _"
                )
        if EQUAL_TIME in self.compare and EQUAL_STEPS not in self.compare:
            raise ValueError("compare: equal_time is as long as the runs of equal_steps take; add that, too")
        return self

    def reference_of(self, variant: str) -> str | None:
        """Return the variant that another is compared with; None where it is itself what others are compared
        with."""
        named = self.variants[variant].reference
        is_by_variant = any(one.reference is not None for one in self.variants.values())
        study_wide = self.reference if is_by_variant else self.reference or next(iter(self.variants))
        found = named or study_wide
        return None if found == variant else found


def read_study(path: Path) -> StudySettings:
    """Return the study that a JSON file describes.

    Raises:
        ConfigError: what is wrong with the file, in one line.
    """
    try:
        return StudySettings.parse(read_document(path))
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(str(path)) else f"{path}: {message}") from None
