"""The name of prepared data: a hash of all that decides what is in it. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from packhorse.data.manifest import DataManifest, read_manifest
from packhorse.data.resolve import data_root, resolve_tokenizer, source_files, template_path, tokenizer_files
from packhorse.recipe.schema import Recipe, Source

DATA_VERSION: Final = 4
"""Raised when the same rows and settings would give other packs."""
FILE_HASHES: Final = "files.json"


def content_key(recipe: Recipe) -> str:
    """Return 16 hex digits over rows, tokenizer, template and settings; where files lie does not matter.

    Raises:
        UserError: A file is missing.
    """
    template = template_path(recipe.data.template)
    tokenizer = tokenizer_files(resolve_tokenizer(recipe))
    parts = {
        "version": DATA_VERSION,
        "sources": [_source_part(source, recipe) for source in recipe.data.sources],
        "validation": [_source_part(source, recipe) for source in recipe.data.validation],
        "retain": [_source_part(source, recipe) for source in recipe.data.retain],
        "tokenizer": {file.name: file_hash(file, data_root(recipe)) for file in tokenizer},
        "template": file_hash(template, data_root(recipe)) if template else None,
        "length": recipe.batch.length,
        "settings": recipe.data.model_dump(exclude={"sources", "validation", "retain", "decontaminate", "template"}),
        "decontaminate": _decontaminate_part(recipe),
    }
    if recipe.model.new_tokens:
        parts["new_tokens"] = recipe.model.new_tokens
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def find_prepared(recipe: Recipe) -> DataManifest | None:
    """Return the manifest of this recipe's prepared data; None while it has to be prepared.

    Raises:
        UserError: A file that the recipe names is missing.
    """
    return read_manifest(data_root(recipe) / content_key(recipe))


def source_hash(source: Source, recipe: Recipe) -> str:
    """Return the SHA-256 of a source's bytes; of a hub data set, that of its name, revision, subset and split."""
    if source.path is not None:
        files = source_files(source.path, data_root(recipe).parent)
        hashes = [file_hash(file, data_root(recipe)) for file in files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    named = json.dumps([source.id, source.revision, source.subset, source.split])
    return hashlib.sha256(named.encode()).hexdigest()


def file_hash(path: Path, root: Path) -> str:
    """Return the SHA-256 of a file's bytes, remembered in `root`/files.json while size and time stay the same."""
    facts = path.stat()
    place, state = str(path.resolve()), [facts.st_size, facts.st_mtime_ns]
    known = _remembered(root)
    entry = known.get(place)
    if isinstance(entry, list) and entry[:2] == state:
        return str(entry[2])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(root, {**known, place: [*state, digest]})
    return digest


def _source_part(source: Source, recipe: Recipe) -> dict[str, Any]:
    read_as = source.model_dump(exclude={"path", "id", "revision", "subset", "split"})
    return {"sha256": source_hash(source, recipe), **read_as}


def _decontaminate_part(recipe: Recipe) -> dict[str, Any] | None:
    asked = recipe.data.decontaminate
    if asked is None:
        return None
    against = [_source_part(source, recipe) for source in asked.against]
    return {"against": against, "ngram": asked.ngram, "action": asked.action}


def _remembered(root: Path) -> dict[str, Any]:
    try:
        known = json.loads((root / FILE_HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(root: Path, hashes: dict[str, Any]) -> None:
    # A folder that is not there yet is not made for it: a check of a recipe leaves nothing behind.
    if not os.access(root, os.W_OK):
        return
    with tempfile.NamedTemporaryFile("w", dir=root, prefix=f".{FILE_HASHES}-", delete=False) as draft:
        json.dump(hashes, draft)
    Path(draft.name).replace(root / FILE_HASHES)
