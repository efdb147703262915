"""data.json, the manifest of a prepared data folder: its contents and sources, and the check that files are intact."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from packhorse.data.ledger import Ledger
from packhorse.errors import UserError

DATA_MANIFEST_FILE: Final = "data.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class FileRecord(_Frozen):
    """Size and hash of one file as it was written."""

    bytes: int
    sha256: str


class SplitCounts(_Frozen):
    """Size of one side of the split."""

    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    """Labels that are not -100."""
    num_packs: int
    fill: float
    """Tokens ÷ (packs × T), from 0 to 1."""
    files: dict[str, FileRecord] = {}
    """Files of the split by name; empty if an earlier version prepared them."""


class SourceRecord(_Frozen):
    """One source as it was read."""

    path: str
    """Path or hub name, as in the recipe."""
    sha256: str
    """Hash of the file's bytes; for a hub data set, of its name, revision, subset and split."""
    rows: int
    format: str
    """Format of the rows, detected or declared."""
    use: str
    """train, validation, test or retain."""
    losses: dict[str, int] = {}
    """Dropped rows of this source, by the reasons of the ledger."""
    removed_nulls: int = 0
    """Nulls that Arrow added for absent keys, and that were removed."""


class TestLook(_Frozen):
    """One opening of the sealed test set."""

    run: str
    """Name of the run."""
    at: str
    """Time in UTC, ISO 8601."""


class DataManifest(_Frozen):
    """Contents of data.json."""

    version: str
    """Version of Packhorse that made it."""

    content_hash: str
    """16 hex digits over rows, tokenizer, template and settings; also the folder's name."""
    tokenizer: str
    """Absolute folder of the tokenizer's files."""
    vocab_size: int
    """Highest token id + 1; a model may have more embeddings, but not fewer."""
    template: str
    """`tokenizer`, `chatml` or the Jinja file."""
    stop_token: str
    """Token that ends an answer."""
    length_tokens: int
    """Tokens in a pack (T)."""
    documents_per_row: int = 1
    """Documents of a row, which follow each other in a pack: 2 for preference pairs."""
    packing: str = "mixed"
    """`data.packing`."""
    settings: dict[str, Any]
    """`data` section of the recipe without sources: the other settings that decided the contents."""
    shares: tuple[float, float, float]
    """Shares of train, validation and test, given or automatic."""
    shares_reason: str
    """Where the shares come from."""
    sources: tuple[SourceRecord, ...]
    splits: dict[str, SplitCounts]
    """Counts of train, and of validation, test and retain if they have rows."""
    fields: tuple[str, ...]
    """Fields other than text that every held-out row has, such as `language`."""
    ledger: Ledger
    findings: dict[str, int] = {}
    """Number of exact duplicates, near duplicates and contaminated rows, kept or dropped."""
    notes: tuple[str, ...] = ()
    """Sentences that the user should read: strata too small, lengths that pack badly."""
    test_rows: str = ""
    """16 hex digits over the content of the test rows: equal rows are the same test set, whatever T is."""
    test_looks: tuple[TestLook, ...] = ()
    """Each opening of the test set here by `packhorse evaluate --test`; preparing these rows again keeps the count."""
    files: dict[str, FileRecord] = {}
    """Files outside the splits, by name: the list of dropped rows, if there is one."""


def read_data_manifest(folder: Path) -> DataManifest | None:
    """Read data.json of a prepared folder; return None if it is absent, as then the folder is not complete."""
    file = folder / DATA_MANIFEST_FILE
    if not file.is_file():
        return None
    return DataManifest.model_validate_json(file.read_text(encoding="utf-8"))


def write_data_manifest(manifest: DataManifest, folder: Path) -> None:
    """Write data.json into a folder that does not have its final name yet."""
    (folder / DATA_MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def recorded_files(manifest: DataManifest) -> dict[str, FileRecord]:
    """Return the record of each file by path in the folder; empty if an earlier version kept no record."""
    in_splits = {
        f"{split}/{name}": file for split, counts in manifest.splits.items() for name, file in counts.files.items()
    }
    return {**in_splits, **manifest.files}


def size_faults(folder: Path, manifest: DataManifest) -> dict[str, str]:
    """Return a sentence for each file that is missing or has another size, without reading the files."""
    faults = {}
    for name, record in recorded_files(manifest).items():
        path = folder / name
        if not path.is_file():
            faults[name] = f"{name} is missing."
        elif (size := path.stat().st_size) != record.bytes:
            faults[name] = f"{name} has {size:,} bytes instead of {record.bytes:,}."
    return faults


def content_faults(folder: Path, manifest: DataManifest) -> dict[str, str]:
    """Return a sentence for each file that is missing or has another size or content (sha256); reads every file."""
    faults = size_faults(folder, manifest)
    for name, record in recorded_files(manifest).items():
        if name in faults:
            continue
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                faults[name] = f"{name} has other content than was written (sha256)."
    return faults


def require_sizes(folder: Path, manifest: DataManifest) -> None:
    """Raise UserError for prepared data that is not complete, before a device is used."""
    faults = size_faults(folder, manifest)
    if not faults:
        return
    raise UserError(
        f"the prepared data in {folder} is damaged: {next(iter(faults.values()))}",
        f"{DATA_MANIFEST_FILE} lists what was written; the run would train on other rows.",
        f"remove {folder}, and prepare it again: packhorse prepare RECIPE makes the same packs from the same rows.",
    )
