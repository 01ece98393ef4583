"""What a model is measured on: text that is read as it stands, or records with prompts and responses.

Three corpora go by the names and the joins that published perplexities of LLaMA use (GPTQ, arXiv:2210.17323,
``datautils.py``), so that numbers can be compared. ``datasets`` runs no code of a data set any more; PTB,
which is one file of code on the hub, is read from the parquet file that the hub made of it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sparse_llama.config.paths import exists, expand
from sparse_llama.config.section import suggest
from sparse_llama.config.settings import DataSettings
from sparse_llama.data.files import take_examples
from sparse_llama.data.records import Example
from sparse_llama.data.sources import open_source
from sparse_llama.data.template import write_records
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.errors import DataError

_BETWEEN_DOCUMENTS = "\n\n"
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@dataclass(frozen=True)
class HubText:
    """Rows of a hub data set that are joined to one text, and what of it is a document."""

    arguments: tuple[str, ...]
    """Of ``datasets.load_dataset``: the data set and its configuration."""
    split: str
    column: str
    join: str
    documents: Literal["rows", "pages", "whole"]
    revision: str | None = None
    """A commit, so that the same name is the same text tomorrow; None where ``data_files`` name one."""
    data_files: dict[str, str] | None = None
    num_rows: int | None = None
    """The first rows alone; None is all."""


HUB_TEXTS = {
    "wikitext2": HubText(
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        "test",
        "text",
        "\n\n",
        "pages",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    ),
    "ptb": HubText(
        ("parquet",),
        "test",
        "sentence",
        " ",
        "whole",
        data_files={
            "test": "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet"
            "/penn_treebank/test/0000.parquet"
        },
    ),
    # of 45,576 documents in this file; the first 1,100 are about 256 windows of 2,048 tokens
    "c4": HubText(
        ("allenai/c4",),
        "validation",
        "text",
        " ",
        "rows",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        data_files={"validation": "en/c4-validation.00000-of-00008.json.gz"},
        num_rows=1100,
    ),
}


@dataclass(frozen=True)
class Corpus:
    """Either text or examples, and where they are from."""

    source: str
    text: str | None = None
    documents: tuple[str, ...] = ()
    """What ``text`` is made of, for measures that read document by document."""
    examples: tuple[Example, ...] = ()
    malformed: tuple[str, ...] = ()
    """Where, and why, for each record that was skipped."""


def read_corpus(name: str, tokenizer: Tokenizer | None = None) -> Corpus:
    """Return ``wikitext2``, ``ptb``, ``c4``, or what a file, a folder, a hub id or ``bundled:people`` holds.

    Records are written in the template of ``tokenizer``, None is Alpaca's. Documents without a prompt are one
    text, with a blank line between them; a ``.txt`` file is one document. Of a data set that sets records
    apart for validation, only those are measured on.

    Raises:
        DataError: there is no such data, it cannot be had now, or it cannot be read.
    """
    if name in HUB_TEXTS:
        return _from_hub(name, HUB_TEXTS[name])
    if not exists(expand(name)) and not any(mark in name for mark in "/:."):
        raise DataError(f"--data: no file and no corpus is called {name!r}{suggest(name, HUB_TEXTS)}")
    source = open_source(name)
    part = "all records" if source.validation is None else "its validation records"
    records = source.training if source.validation is None else source.validation
    malformed: list[str] = []
    examples = take_examples(
        write_records(records, tokenizer), malformed, DataSettings().max_malformed, "repair the data"
    )
    if not examples:
        raise DataError(f"--data {name}: no records")
    if any(example.prompt for example in examples):
        return Corpus(f"{name}, {part}", examples=tuple(examples), malformed=tuple(malformed))
    documents = [example.response for example in examples]
    how = "whole" if len(documents) == 1 else f"{len(documents):,} documents with a blank line between"
    text = _BETWEEN_DOCUMENTS.join(documents)
    return Corpus(f"{name}, {how}", text=text, documents=tuple(documents), malformed=tuple(malformed))


def pages_of(rows: Iterable[str]) -> list[str]:
    """Return the articles of WikiText's rows, which are lines: each from its heading, ``= Title =``, on."""
    pages: list[list[str]] = [[]]
    for row in rows:
        line = row.removesuffix("\n") or " "  # the hub's rows are empty where the file has a blank in a line
        heading = line.strip()
        if heading.startswith("= ") and heading.endswith(" =") and not heading.startswith("= ="):
            pages.append([])
        pages[-1].append(line)
    joined = ["\n".join(lines) for lines in pages]
    return [page for page in joined if page.strip()]


def _from_hub(name: str, hub_text: HubText) -> Corpus:
    import datasets  # 2 s, and only the hub's corpora need it
    from datasets.exceptions import DatasetsError

    named = {"data_files": hub_text.data_files, "revision": hub_text.revision}
    options: dict[str, Any] = {option: value for option, value in named.items() if value is not None}
    try:
        rows = datasets.load_dataset(*hub_text.arguments, split=hub_text.split, **options)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise DataError(
            f"--data {name}: not available from the hub ({type(error).__name__}: {reason}); check the "
            "network, or give a local file: --data FILE.txt"
        ) from error
    texts = list(rows[hub_text.column][: hub_text.num_rows])
    text = hub_text.join.join(texts)
    documents = {"rows": texts, "pages": pages_of(texts), "whole": [text]}[hub_text.documents]
    origin = " ".join([*hub_text.arguments, *(hub_text.data_files or {}).values()])
    commit = hub_text.revision or _commit_of(rows)
    read = origin if commit is None else f"{origin}, revision {commit}"
    source = f"{read}, {hub_text.split}, {len(texts):,} rows joined by {hub_text.join!r}"
    return Corpus(source, text=text, documents=tuple(documents))


def _commit_of(rows: Any) -> str | None:
    """Return the commit that ``datasets`` has read files of, where it says so."""
    found = _COMMIT.search(" ".join(rows.info.download_checksums or {}))
    return None if found is None else found[1]
