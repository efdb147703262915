"""Pass over the rows of one source in batches: render, prove, hash and append them to the spool."""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from packhorse.data.checks.contamination import EvaluationIndex
from packhorse.data.checks.encoding import fix_encoding_errors
from packhorse.data.checks.keys import (
    answer_keys,
    content_keys,
    normalised_answer_keys,
    normalised_prompt_keys,
    prompt_keys,
)
from packhorse.data.checks.language import languages
from packhorse.data.checks.texts import answer_text, prompt_text, row_text
from packhorse.data.checks.words import signatures
from packhorse.data.formats.example import Example
from packhorse.data.formats.key_counts import KeyCounts
from packhorse.data.gather.spool import SpoolWriter
from packhorse.data.read.arrow_values import RemovedNulls
from packhorse.data.read.row import RowMistakes
from packhorse.data.render.judged import documents_of, render_pairs, render_verdicts
from packhorse.data.render.render import Rendered, Renderer, render_examples
from packhorse.data.render.serving import check_serving
from packhorse.data.resolve import source_name
from packhorse.errors import Mistake
from packhorse.recipe.objectives import RowFormat, row_kind
from packhorse.recipe.schema import DataSection, Source

SourceUse = Literal["train", "validation", "test", "retain"]
BatchCallback = Callable[["GatheredSource", Sequence[Example], Sequence[Rendered]], None]
"""Callback for each batch of rows that can be trained on: source, rows, rendered rows."""

BATCH_ROWS: Final = 1000
SERVED_ROWS: Final = 20
KNOWN_WITHOUT_FIELD: Final = ("language", "source")
# Separates a number from a name; the number gives names an order and is not shown.
ORDER_END: Final = "\0"
ORDER: Final = re.compile(r"\d{3,}\0")
NO_KEYS: Final = np.empty((0, 2), np.uint64)
RENDERERS: Final = {"answers": render_examples, "pairs": render_pairs, "verdicts": render_verdicts}
MARGIN: Final = "margin"


@dataclass(frozen=True, eq=False)
class GatheredSource:
    """One source of the recipe.

    Attributes:
        declared: Source as in the recipe.
        use: Purpose of its rows.
        row_format: Format of its rows, detected or declared.
        mistakes: Bad rows of the source.
        removed_nulls: Nulls that Arrow added and that were removed.
        key_counts: Keys of its rows: used, kept and ignored; complete after the pass.
    """

    declared: Source
    use: SourceUse
    row_format: RowFormat
    mistakes: RowMistakes
    removed_nulls: RemovedNulls
    key_counts: KeyCounts = field(default_factory=KeyCounts)

    @property
    def name(self) -> str:
        """Name of the source in messages."""
        return source_name(self.declared)


@dataclass
class Strata:
    """Codes of strata in the order of their first row; `sorted_codes` makes them independent of that order."""

    codes: dict[str, int] = field(default_factory=dict)

    def code(self, name: str) -> int:
        """Return the code of a stratum; a new stratum gets the next code."""
        return self.codes.setdefault(name, len(self.codes))

    def names(self) -> tuple[str, ...]:
        """Return the names to show, in the order of `sorted_codes`."""
        return tuple(ORDER.sub("", name) for name in sorted(self.codes))

    def sorted_codes(self, codes: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return int32 [R], indices into the sorted names, for codes int32 [R]."""
        index_of = {name: index for index, name in enumerate(sorted(self.codes))}
        return np.array([index_of[name] for name in self.codes], np.int32)[codes] if len(codes) else codes


@dataclass(frozen=True)
class SourcePass:
    """Pass over the rows of one source."""

    data: DataSection
    source: GatheredSource
    number: int
    renderer: Renderer
    served: PreTrainedTokenizerBase
    evaluated: EvaluationIndex | None
    strata: Strata
    with_prompts: bool

    def run(
        self, examples: Iterator[Example], spool: SpoolWriter, watch: BatchCallback | None
    ) -> tuple[frozenset[str], int]:
        """Render and append all rows; return the names of the fields that all rows have, and the number of rows."""
        shared: set[str] | None = None
        num_rows = 0
        for number, batch in enumerate(_batches(examples)):
            kept, rendered = self._render(batch, is_first=number == 0)
            num_rows += len(kept)
            if not kept:
                continue
            texts = [row_text(example) for example in kept]
            spool.append(kept, rendered, self._signatures(kept, texts), self._columns(kept, texts))
            for example in kept:
                shared = set(example.fields) if shared is None else shared & example.fields.keys()
            if watch is not None:
                watch(self.source, kept, rendered)
            gc.collect(0)
        return frozenset(shared or ()), num_rows

    def _render(self, batch: list[Example], is_first: bool) -> tuple[list[Example], list[Rendered]]:
        if self.needed:
            batch = [example for example in batch if self._has_fields(example)]
        if self.data.strip:
            batch = [_stripped(example) for example in batch]
        if self.data.half_thinking == "open" and self.renderer.chats is not None:
            batch = [self.renderer.chats.thinking.opened(example) for example in batch]
        if self.data.fix_encoding:
            batch = [_with_fixed_encoding(example) for example in batch]
        rendered = RENDERERS[row_kind(self.source.row_format)](self.renderer, batch, self.source.mistakes)
        pairs = [(example, row) for example, row in zip(batch, rendered) if row is not None]
        if is_first:
            served = [chat for example, row in pairs[:SERVED_ROWS] for chat in documents_of(example, row)]
            check_serving(self.renderer, served, self.served)
        return [example for example, _ in pairs], [row for _, row in pairs]

    @cached_property
    def needed(self) -> list[str]:
        """Names of the fields that every row must have for the split."""
        split = self.data.split
        named = [name for name in split.stratify if name not in KNOWN_WITHOUT_FIELD]
        return named + ([split.group_by] if split.group_by else [])

    @property
    def normalises(self) -> bool:
        """Whether prompts and answers are compared in normalised form: for leaks into given splits, and to audit."""
        return self.with_prompts or bool(self.data.validation or self.data.test)

    def _has_fields(self, example: Example) -> bool:
        missing = [name for name in self.needed if name not in example.fields]
        if missing:
            self.source.mistakes.add(
                Mistake(
                    f"the row has no {' and no '.join(missing)}; its other fields are "
                    f"{', '.join(example.fields) or 'none'}.",
                    "data.split.stratify keeps the shares of a field equal on each side, data.split.group_by its "
                    "values on one side.",
                    "add the field to the row, or remove it from data.split.",
                    example.where,
                )
            )
        return not missing

    def _signatures(self, examples: list[Example], texts: list[str]) -> dict[str, NDArray[np.uint32]]:
        near = self.data.duplicates.near
        answers = {"answers": signatures([answer_text(example) for example in examples])} if near == "drop" else {}
        return {} if near == "ignore" else {"rows": signatures(texts), **answers}

    def _columns(self, examples: list[Example], texts: list[str]) -> dict[str, NDArray[Any]]:
        num_rows = len(examples)
        if self.evaluated is None:
            hits = [False] * num_rows
        else:
            hits = self.evaluated.hits(texts, [prompt_text(example) for example in examples])
        return {
            "keys": content_keys(examples),
            "prompt_keys": prompt_keys(examples) if self.with_prompts else NO_KEYS,
            "answer_keys": answer_keys(examples) if self.with_prompts else NO_KEYS,
            "normalised_prompt_keys": normalised_prompt_keys(examples) if self.normalises else NO_KEYS,
            "normalised_answer_keys": normalised_answer_keys(examples) if self.normalises else NO_KEYS,
            "source": np.full(num_rows, self.number, np.int16),
            "stratum": self._stratum_codes(examples, texts),
            "conversation": self._conversations(examples),
            "contaminated": np.array(hits, np.bool_),
            **self._verdict_columns(examples),
        }

    def _verdict_columns(self, examples: list[Example]) -> dict[str, NDArray[Any]]:
        kind = row_kind(self.source.row_format)
        margins = [example.fields.get(MARGIN) for example in examples] if kind == "pairs" else []
        known = [margin if isinstance(margin, int | float) else np.nan for margin in margins]
        verdicts = [float(bool(example.desirable)) for example in examples] if kind == "verdicts" else []
        return {"margins": np.array(known, np.float64), "verdicts": np.array(verdicts, np.float64)}

    def _stratum_codes(self, examples: list[Example], texts: list[str]) -> NDArray[np.int32]:
        fields = self.data.split.stratify
        values = [self._values(name, examples, texts) for name in fields]
        names = [" · ".join(parts) for parts in zip(*values)] if fields else [""] * len(examples)
        return np.array([self.strata.code(name) for name in names], np.int32)

    def _values(self, name: str, examples: list[Example], texts: list[str]) -> list[str]:
        if name == "source":
            # The number comes first, so that the name of a file does not decide on which side a row is.
            return [f"{self.number:03}{ORDER_END}{self.source.name}"] * len(examples)
        if name == "language" and not all(name in example.fields for example in examples):
            return [str(example.fields.get(name) or code) for example, code in zip(examples, languages(texts))]
        return [str(example.fields[name]) for example in examples]

    def _conversations(self, examples: list[Example]) -> NDArray[np.uint64]:
        name = self.data.split.group_by
        if name is None:
            return np.zeros(len(examples), np.uint64)
        digests = [hashlib.blake2b(str(example.fields[name]).encode(), digest_size=8) for example in examples]
        return np.frombuffer(b"".join(digest.digest() for digest in digests), np.uint64)


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _stripped(example: Example) -> Example:
    return example.with_turns(
        lambda turn: replace(turn, content=turn.content.strip(), thinking=turn.thinking and turn.thinking.strip())
    )


def _with_fixed_encoding(example: Example) -> Example:
    fixed = example.with_turns(lambda turn: replace(turn, content=fix_encoding_errors(turn.content)))
    return replace(fixed, text=example.text and fix_encoding_errors(example.text))
