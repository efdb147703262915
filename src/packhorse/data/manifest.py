"""data.json: what a prepared data folder holds, and from what it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from packhorse.data.ledger import Ledger

MANIFEST_FILE: Final = "data.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class FileRecord(_Frozen):
    """One file as it was written."""

    bytes: int
    sha256: str


class SplitCounts(_Frozen):
    """Size of one split."""

    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    """Labels that are not -100."""
    num_packs: int
    fill: float
    """Tokens ÷ (packs × T), from 0 to 1."""
    files: dict[str, FileRecord] = {}
    """Each file of the split, by name; empty in what an earlier version prepared."""


class SourceFound(_Frozen):
    """A source as it was read."""

    path: str
    """Path or hub name, as the recipe has it."""
    sha256: str
    """Of the file's bytes; for a hub data set, of its name, revision, subset and split."""
    rows: int
    format: str
    """Format of the rows, found or declared."""
    use: str
    """train, validation or retain."""
    losses: dict[str, int] = {}
    """Rows of this source that were left out, by the reasons of the ledger."""


class TestLook(_Frozen):
    """One opening of the sealed test set."""

    run: str
    """Name of the run."""
    at: str
    """Time in UTC, ISO 8601."""


class DataManifest(_Frozen):
    """The whole of data.json."""

    version: str
    """Of Packhorse, which made it."""

    content_hash: str
    """16 hex digits over rows, tokenizer, template and settings; also the folder's name."""
    tokenizer: str
    """Absolute folder of the tokenizer's files."""
    vocab_size: int
    """Highest token id + 1; a model may have more embeddings, never fewer."""
    template: str
    """`tokenizer`, `chatml` or the Jinja file."""
    stop_token: str
    """Token that ends an answer."""
    length_tokens: int
    """Tokens in a pack (T)."""
    packing: str = "mixed"
    """`data.packing`."""
    settings: dict[str, Any]
    """The recipe's `data` section without sources: what decided beside rows, tokenizer and template."""
    shares: tuple[float, float, float]
    """Shares of train, validation and test that were asked for or chosen."""
    shares_reason: str
    """Why they are what they are."""
    sources: tuple[SourceFound, ...]
    splits: dict[str, SplitCounts]
    """train, and those of validation, test and retain that have rows."""
    fields: tuple[str, ...]
    """Fields that every row of validation and retain has beside its text, such as `language`."""
    ledger: Ledger
    findings: dict[str, int] = {}
    """Rows that are copies, nearly copies or contaminated, whatever became of them."""
    notes: tuple[str, ...] = ()
    """What a person should know: strata too small, lengths that pack badly, frames taken for no copies."""
    test_rows: str = ""
    """16 hex digits over what the test rows say: the same rows are the same test set, whatever T is."""
    test_looks: tuple[TestLook, ...] = ()
    """Each opening of the test set by `packhorse evaluate --test`, here; rows prepared anew carry on the count."""
    files: dict[str, FileRecord] = {}
    """Each file beside the splits, by name: the list of dropped rows, where there is one."""


def read_manifest(folder: Path) -> DataManifest | None:
    """Read a prepared folder's data.json; None where there is none, so nothing complete is there."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    return DataManifest.model_validate_json(file.read_text(encoding="utf-8"))


def write_manifest(manifest: DataManifest, folder: Path) -> None:
    """Write data.json into a folder that is not yet under its final name."""
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
