"""The key of prepared data: a hash of all that decides its contents. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from packhorse.data.data_manifest import DataManifest, read_data_manifest
from packhorse.data.resolve import data_root, resolve_tokenizer, source_files, template_path, tokenizer_files
from packhorse.recipe.schema import Recipe, Source

DATA_VERSION: Final = 5
"""Raised when the same rows and settings would give different packs."""
FILE_HASHES: Final = "files.json"
SOURCE_LISTS: Final = ("sources", "validation", "test", "retain")


def content_key(recipe: Recipe) -> str:
    """Return 16 hex digits over rows, tokenizer, template and settings; the location of files does not matter.

    Raises:
        UserError: A file is missing.
    """
    template = template_path(recipe.data.template)
    tokenizer = tokenizer_files(resolve_tokenizer(recipe))
    parts: dict[str, Any] = {
        "version": DATA_VERSION,
        **{name: [_source_part(source, recipe) for source in getattr(recipe.data, name)] for name in SOURCE_LISTS},
        "tokenizer": {file.name: file_hash(file, data_root(recipe)) for file in tokenizer},
        "template": file_hash(template, data_root(recipe)) if template else None,
        "length": recipe.batch.length,
        "settings": recipe.data.model_dump(exclude={*SOURCE_LISTS, "decontaminate", "template"}),
        "decontaminate": _decontaminate_part(recipe),
    }
    if recipe.objective.takes != "answers":
        parts["takes"] = recipe.objective.takes
    if recipe.model.new_tokens:
        parts["new_tokens"] = recipe.model.new_tokens
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def find_prepared(recipe: Recipe) -> DataManifest | None:
    """Return the manifest of this recipe's prepared data; None if it is not prepared yet.

    Raises:
        UserError: A file that the recipe names is missing.
    """
    return read_data_manifest(data_root(recipe) / content_key(recipe))


def source_hash(source: Source, recipe: Recipe) -> str:
    """Return the SHA-256 of a source's bytes; for a hub data set, of its name, revision, subset and split."""
    if source.path is not None:
        files = source_files(source.path, data_root(recipe).parent)
        hashes = [file_hash(file, data_root(recipe)) for file in files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    named = json.dumps([source.id, source.revision, source.subset, source.split])
    return hashlib.sha256(named.encode()).hexdigest()


def file_hash(path: Path, root: Path) -> str:
    """Return the SHA-256 of a file's bytes, cached in `root`/files.json while size and modification time are equal."""
    facts = path.stat()
    location, state = str(path.resolve()), [facts.st_size, facts.st_mtime_ns]
    known = _cached_hashes(root)
    entry = known.get(location)
    if isinstance(entry, list) and entry[:2] == state:
        return str(entry[2])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _cache_hashes(root, {**known, location: [*state, digest]})
    return digest


def _source_part(source: Source, recipe: Recipe) -> dict[str, Any]:
    unset = {"good_rating"} if source.good_rating is None else set()
    read_as = source.model_dump(exclude={"path", "id", "revision", "subset", "split", *unset})
    return {"sha256": source_hash(source, recipe), **read_as}


def _decontaminate_part(recipe: Recipe) -> dict[str, Any] | None:
    decontaminate = recipe.data.decontaminate
    if decontaminate is None:
        return None
    against = [_source_part(source, recipe) for source in decontaminate.against]
    return {"against": against, "ngram": decontaminate.ngram, "action": decontaminate.action}


def _cached_hashes(root: Path) -> dict[str, Any]:
    try:
        known = json.loads((root / FILE_HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _cache_hashes(root: Path, hashes: dict[str, Any]) -> None:
    # The folder is not created just for the cache: a check of a recipe leaves nothing behind.
    if not os.access(root, os.W_OK):
        return
    with tempfile.NamedTemporaryFile("w", dir=root, prefix=f".{FILE_HASHES}-", delete=False) as draft:
        json.dump(hashes, draft)
    Path(draft.name).replace(root / FILE_HASHES)
