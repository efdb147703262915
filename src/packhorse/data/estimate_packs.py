"""Estimate the number of packs from the first rows; `packhorse prepare` counts them exactly."""

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

from packhorse.data.read.listing import form_of
from packhorse.data.resolve import fast_tokenizer, source_files
from packhorse.data.split.shares import given_splits, resolve_shares
from packhorse.errors import UserError
from packhorse.recipe.locate import path_of
from packhorse.recipe.schema import Recipe, Source

SAMPLE_ROWS: Final = 500
SAMPLE_BYTES: Final = 4 << 20
CHARACTERS_PER_TOKEN: Final = 4.0
"""Mean of English text, for tokenizers that are not on this machine; other languages and code need more tokens."""
TEMPLATE_TOKENS_PER_ROW: Final = 12
"""Approximate tokens that a chat template adds to a row of two turns."""
FILL: Final = 0.98
"""Share of a pack that packing fills."""


@dataclass(frozen=True)
class PackEstimate:
    """Estimated result of `packhorse prepare`.

    Attributes:
        num_rows: Rows of all sources.
        num_packs: Packs in the train split.
        reason: What the estimate is based on.
    """

    num_rows: int
    num_packs: int
    reason: str


def estimate_packs(recipe: Recipe) -> PackEstimate | None:
    """Estimate rows and packs from the first rows of each file.

    Returns:
        None where the first rows say too little: sources of the hub or the quickstart, compressed files, files other
        than JSON lines and Parquet, sources with weights.
    """
    try:
        return _guess(recipe)
    except (UserError, OSError, ValueError):
        # `prepare` reports what is wrong with the rows or their shares.
        return None


def _guess(recipe: Recipe) -> PackEstimate | None:
    sampled = [_sample_of(source, recipe) for source in recipe.data.sources]
    if not all(sampled) or any(source.weight is not None for source in recipe.data.sources):
        return None
    samples = [sample for sample in sampled if sample is not None]
    tokenizer = fast_tokenizer(recipe)
    num_rows = sum(sample.num_rows for sample in samples)
    num_tokens = sum(s.num_rows * (_mean_tokens(s, tokenizer) + TEMPLATE_TOKENS_PER_ROW) for s in samples)
    share = resolve_shares(recipe.data.split, num_rows, given_splits(recipe.data))[0][0]
    packs = num_rows if recipe.data.packing == "none" else num_tokens / (recipe.batch.length * FILL)
    num_sampled = sum(len(sample.texts) for sample in samples)
    by = "their tokens" if tokenizer is not None else f"{CHARACTERS_PER_TOKEN:g} characters per token"
    reason = f"an estimate from {num_sampled:,} of about {num_rows:,} rows, by {by}"
    return PackEstimate(num_rows, max(1, math.ceil(share * packs)), reason)


@dataclass(frozen=True)
class _Sample:
    """Number of rows of one source, and the texts of its first rows."""

    num_rows: int
    texts: list[str]


def _sample_of(source: Source, recipe: Recipe) -> _Sample | None:
    if source.path is None or source.path.startswith("builtin:"):
        return None
    num_rows, texts = 0, []
    for path in source_files(source.path, path_of(recipe.runs_folder)):
        form, compression = form_of(path)
        if compression is not None or form not in (".jsonl", ".parquet"):
            return None
        number, rows = _sample_lines(path) if form == ".jsonl" else _sample_parquet(path)
        num_rows += number
        texts += rows
    return _Sample(min(num_rows, source.rows or num_rows), texts) if texts else None


def _sample_lines(path: Path) -> tuple[int, list[str]]:
    with path.open("rb") as file:
        lines = list(islice(iter(lambda: file.readline(SAMPLE_BYTES), b""), SAMPLE_ROWS))
    texts = ["\n".join(_texts_in(json.loads(line))) for line in lines if line.strip()]
    size = sum(map(len, lines))
    return (round(path.stat().st_size * len(texts) / size) if size else 0), texts


def _sample_parquet(path: Path) -> tuple[int, list[str]]:
    with parquet.ParquetFile(path) as file:
        batch = next(file.iter_batches(batch_size=SAMPLE_ROWS), None)
        rows = batch.to_pylist() if batch is not None else []
        return file.metadata.num_rows, ["\n".join(_texts_in(row)) for row in rows]


def _texts_in(value: Any) -> Iterator[str]:  # noqa: ANN401
    """Yield every text in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)


def _mean_tokens(sample: _Sample, tokenizer: Tokenizer | None) -> float:
    if tokenizer is None:
        return sum(map(len, sample.texts)) / CHARACTERS_PER_TOKEN / len(sample.texts)
    return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(sample.texts)) / len(sample.texts)
