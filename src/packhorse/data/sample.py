"""How many packs rows would make, guessed from the first of them: what is prepared is counted, this is not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from pyarrow import parquet
from tokenizers import Tokenizer

from packhorse.data.fast_tokenizer import fast_tokenizer
from packhorse.data.read.listing import form_of
from packhorse.data.resolve import source_files
from packhorse.data.split.shares import resolve_shares
from packhorse.errors import UserError
from packhorse.recipe.locate import path_of
from packhorse.recipe.schema import Recipe, Source

SAMPLE_ROWS: Final = 500
SAMPLE_BYTES: Final = 4 << 20
CHARACTERS_A_TOKEN: Final = 4.0
"""Of English text, where the tokenizer is not on this machine; other languages and code take more tokens."""
TOKENS_A_ROW: Final = 12
"""Of a template's own words in a row of two turns, about."""
FULL: Final = 0.98
"""Of a pack, what packing fills."""


@dataclass(frozen=True)
class Guess:
    """What preparing would about find.

    Attributes:
        num_rows: Of all sources.
        num_packs: That are trained on.
        reason: What was looked at.
    """

    num_rows: int
    num_packs: int
    reason: str


def guess_packs(recipe: Recipe) -> Guess | None:
    """Reads the first rows of each file and takes the others for alike.

    Returns:
        None where that says too little: sources of the hub or the quickstart, files that are packed or are neither JSON
        lines nor Parquet, sources with weights.
    """
    try:
        return _guess(recipe)
    except (UserError, OSError, ValueError):
        # What is wrong with the rows, or their shares, is said by whoever prepares them.
        return None


def _guess(recipe: Recipe) -> Guess | None:
    sampled = [_of_source(source, recipe) for source in recipe.data.sources]
    if not all(sampled) or any(source.weight is not None for source in recipe.data.sources):
        return None
    parts = [part for part in sampled if part is not None]
    tokenizer = fast_tokenizer(recipe)
    num_rows = sum(part.num_rows for part in parts)
    num_tokens = sum(part.num_rows * (_mean_tokens(part, tokenizer) + TOKENS_A_ROW) for part in parts)
    share = 1.0 if recipe.data.validation else resolve_shares(recipe.data.split, num_rows)[0][0]
    packs = num_rows if recipe.data.packing == "none" else num_tokens / (recipe.batch.length * FULL)
    seen = sum(len(part.texts) for part in parts)
    by = "their tokens" if tokenizer is not None else f"{CHARACTERS_A_TOKEN:g} characters a token"
    reason = f"a guess from {seen:,} of about {num_rows:,} rows, by {by}"
    return Guess(num_rows, max(1, math.ceil(share * packs)), reason)


@dataclass(frozen=True)
class _Part:
    """Of one source: rows in all, and the text of the first."""

    num_rows: int
    texts: list[str]


def _of_source(source: Source, recipe: Recipe) -> _Part | None:
    if source.path is None or source.path.startswith("builtin:"):
        return None
    num_rows, texts = 0, []
    for path in source_files(source.path, path_of(recipe.runs_folder)):
        form, packed = form_of(path)
        if packed is not None or form not in (".jsonl", ".parquet"):
            return None
        number, rows = _of_lines(path) if form == ".jsonl" else _of_parquet(path)
        num_rows += number
        texts += rows
    return _Part(min(num_rows, source.rows or num_rows), texts) if texts else None


def _of_lines(path: Path) -> tuple[int, list[str]]:
    with path.open("rb") as file:
        lines = list(islice(iter(lambda: file.readline(SAMPLE_BYTES), b""), SAMPLE_ROWS))
    texts = ["\n".join(_words(json.loads(line))) for line in lines if line.strip()]
    size = sum(map(len, lines))
    return (round(path.stat().st_size * len(texts) / size) if size else 0), texts


def _of_parquet(path: Path) -> tuple[int, list[str]]:
    with parquet.ParquetFile(path) as file:
        batch = next(file.iter_batches(batch_size=SAMPLE_ROWS), None)
        rows = batch.to_pylist() if batch is not None else []
        return file.metadata.num_rows, ["\n".join(_words(row)) for row in rows]


def _words(value: Any) -> Iterator[str]:  # noqa: ANN401
    """Every text in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _words(each)
    elif isinstance(value, list):
        for each in value:
            yield from _words(each)


def _mean_tokens(part: _Part, tokenizer: Tokenizer | None) -> float:
    if tokenizer is None:
        return sum(map(len, part.texts)) / CHARACTERS_A_TOKEN / len(part.texts)
    return sum(len(each.ids) for each in tokenizer.encode_batch(part.texts)) / len(part.texts)
