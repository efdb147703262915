"""The audit of `packhorse check`: the same pass over the data as `prepare`, with a score card for each source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.audit_report import AuditReport, DuplicateGroup, RowAudit, SourceAudit, SplitAudit
from packhorse.data.checks.counters import MOST_SAMPLES, Sample, make_sample
from packhorse.data.checks.keys import NO_PROMPT, Keys, distinct_rows
from packhorse.data.checks.scorecard import ScoreCard, ScoreKeeper
from packhorse.data.decide import KEPT, TEST
from packhorse.data.formats.example import Example
from packhorse.data.gather.gather import GatheredRows
from packhorse.data.gather.source_pass import GatheredSource
from packhorse.data.gather.spool import text_of
from packhorse.data.ledger import SIDES
from packhorse.data.pack_rows import PackedRows, fill, pack_rows
from packhorse.data.packs.batches import BatchPlan, step_notes, unit_note, units_of_steps
from packhorse.data.packs.store import figures_of
from packhorse.data.preference_notes import preference_notes
from packhorse.data.render.judged import documents_of
from packhorse.data.render.render import Rendered, Renderer
from packhorse.data.resolve import resolve_tokenizer
from packhorse.recipe.schema import Recipe

SHOWN_ROWS: Final = 12
SHOWN_ROWS_OF_A_SOURCE: Final = 4
SHOWN_GROUPS: Final = 10
SHOWN_LOCATIONS: Final = 20
SHOWN_CHARACTERS: Final = 160
PERCENTILES: Final = (0, 50, 90, 99, 100)
MOST_BINS: Final = 28
DROPPED: Final = "dropped"

Int64 = NDArray[np.int64]


def audit(recipe: Recipe, progress: Callable[[int], None] | None = None) -> AuditReport:
    """Read, render and check every row, and write nothing permanent; call `progress` with the number of rows done.

    Raises:
        UserError: `prepare` would raise the same.
    """
    watch = _AuditCallback(recipe.data.train_on.roles, progress)
    with TemporaryDirectory(prefix="packhorse-check-") as folder:
        packed = pack_rows(recipe, Path(folder) / "spool", watch, with_prompts=True)
        return _report(recipe, packed, watch)


class _AuditCallback:
    """Collects the score card of each source and the first rows of the data, batch by batch."""

    def __init__(self, trained_roles: Sequence[str], progress: Callable[[int], None] | None) -> None:
        self._trained_roles, self._progress = trained_roles, progress
        # The key is the source itself: two sources may have one name, such as subsets of one hub data set.
        self.keepers: dict[GatheredSource, ScoreKeeper] = {}
        self.rows: list[tuple[int, Example, Rendered]] = []
        self._num_seen = 0
        self._source: GatheredSource | None = None
        self._num_wanted = 0

    def __call__(self, source: GatheredSource, examples: Sequence[Example], rendered: Sequence[Rendered]) -> None:
        keeper = self.keepers.setdefault(source, ScoreKeeper(source.name, self._trained_roles))
        keeper.add(examples, [len(row.ids) for row in rendered])
        if source is not self._source:
            self._source, self._num_wanted = source, SHOWN_ROWS_OF_A_SOURCE
        wanted = min(self._num_wanted, SHOWN_ROWS - len(self.rows))
        self._num_wanted -= min(wanted, len(examples))
        self.rows += [
            (self._num_seen + at, example, row) for at, (example, row) in enumerate(zip(examples[:wanted], rendered))
        ]
        self._num_seen += len(examples)
        if self._progress is not None:
            self._progress(self._num_seen)


def _report(recipe: Recipe, packed: PackedRows, watch: _AuditCallback) -> AuditReport:
    gathered, decision = packed.gathered, packed.decision
    lengths = gathered.spool.columns.tokens
    percentiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()
    supervised = gathered.spool.supervised()
    return AuditReport(
        name=recipe.name,
        tokenizer=resolve_tokenizer(recipe).name,
        template=f"{recipe.data.template} of {day}" if (day := recipe.data.template_date) else recipe.data.template,
        stop_token=gathered.renderer.tokenizer.eos_token,
        length_tokens=recipe.batch.length,
        sources=tuple(_source(gathered, number) for number in range(len(gathered.sources))),
        ledger=packed.fitted.ledger,
        splits={side: _split(packed, side, recipe) for side in packed.packings},
        shares=decision.shares,
        shares_reason=decision.shares_reason,
        length_percentiles=dict(zip(PERCENTILES, percentiles)),
        length_histogram=length_histogram(lengths),
        num_tokens=int(lengths.sum()),
        supervised_share=float(np.count_nonzero(supervised) / len(supervised)),
        cards=tuple(_card(packed, number, watch) for number in range(len(gathered.sources))),
        duplicates=_largest_groups(packed),
        num_contaminated=decision.findings["contaminated"],
        contaminated=_locations(packed, gathered.spool.columns.contaminated),
        notes=(
            *packed.notes,
            *step_notes(packed.packings["train"].num_packs, recipe.batch.packs),
            *_preference_notes(recipe, packed),
        ),
        # Nobody should see test rows before the final measurement.
        rows=tuple(row for seen in watch.rows for row in _rows(packed, *seen) if row.split != "test"),
    )


def _preference_notes(recipe: Recipe, packed: PackedRows) -> list[str]:
    documents, packing = packed.side("train"), packed.packings["train"]
    if documents.per_row == 1:
        return []
    costs = figures_of(packing, documents.lengths, documents.labels)[2]
    plan = BatchPlan(costs, recipe.batch.packs, recipe.seed, recipe.data.packing == "in_order")
    units = units_of_steps(plan, np.diff(packing.offsets) // documents.per_row)
    notes = preference_notes(packed.gathered.spool.columns, documents.item_rows, recipe.objective)
    return [*notes, unit_note(recipe.objective.unit, units)]


def _source(gathered: GatheredRows, number: int) -> SourceAudit:
    source = gathered.sources[number]
    num_rows = int(np.count_nonzero(gathered.spool.columns.source == number)) + source.mistakes.num_rows
    keys = source.key_counts.under_names_of(source.declared.columns)
    return SourceAudit(source.name, source.row_format, num_rows, source.use, keys)


def _split(packed: PackedRows, side: str, recipe: Recipe) -> SplitAudit:
    documents, packing = packed.side(side), packed.packings[side]
    rows = packed.decision.sides == SIDES.index(side)
    counts = np.bincount(packed.gathered.spool.columns.stratum[rows], minlength=len(packed.gathered.strata))
    return SplitAudit(
        num_rows=int(np.count_nonzero(rows)),
        num_tokens=int(documents.lengths.sum()),
        num_packs=packing.num_packs,
        fill=fill(documents, packing, recipe.batch.length),
        strata={name: int(count) for name, count in zip(packed.gathered.strata, counts) if name and count},
    )


def length_histogram(lengths: Int64) -> tuple[tuple[int, int], ...]:
    """Return (upper bound, rows) of bins whose bounds grow by a constant factor, from shortest to longest row."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    bounds = np.unique(np.geomspace(shortest, max(longest, shortest + 1), MOST_BINS).round().astype(np.int64))
    bins = np.searchsorted(bounds, lengths)
    return tuple(zip(bounds.tolist(), np.bincount(bins, minlength=len(bounds)).tolist()))


def _card(packed: PackedRows, number: int, watch: _AuditCallback) -> ScoreCard:
    decision, gathered = packed.decision, packed.gathered
    columns = gathered.spool.columns
    here = columns.source == number
    copies, alike = _later_rows(decision.equal), _later_rows(decision.alike)
    source = gathered.sources[number]
    keeper = watch.keepers.get(source) or ScoreKeeper(source.name)
    prompts = columns.normalised_prompt_keys[here & gathered.is_chat]
    card = keeper.card(
        exact_duplicates=int(np.count_nonzero(copies & here)),
        near_duplicates=int(np.count_nonzero(alike & ~copies & here)),
        contradictions=int(np.count_nonzero(decision.contradicting & here)),
        contradicting=_samples(packed, decision.contradicting & here),
        leaks=int(np.count_nonzero(decision.leaked & here)),
        repeated_prompts=_num_repeated(prompts[(prompts != NO_PROMPT).any(axis=1)]),
    )
    # Nobody should see test rows before the final measurement.
    return replace(card, samples={}) if source.use == "test" else card


def _num_repeated(prompts: Keys) -> int:
    """Return the number of prompts that equal an earlier one, if fewer than half of them are distinct; else 0."""
    num_distinct = int(np.count_nonzero(distinct_rows(prompts)[1]))
    return len(prompts) - num_distinct if 2 * num_distinct < len(prompts) else 0


def _samples(packed: PackedRows, rows: NDArray[np.bool_]) -> list[Sample]:
    wanted = np.flatnonzero(rows)[:MOST_SAMPLES].tolist()
    return [make_sample(row["where"], text_of(row)) for row in packed.gathered.spool.texts(wanted)]


def _later_rows(labels: Int64) -> NDArray[np.bool_]:
    """Return bool [R]: rows that are not the first of their label; a label is the index of its first row."""
    return np.asarray(labels != np.arange(len(labels)))


def _largest_groups(packed: PackedRows) -> tuple[DuplicateGroup, ...]:
    alike = packed.decision.alike
    labels, counts = np.unique(alike[~np.isin(alike, alike[packed.decision.sides == TEST])], return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:SHOWN_GROUPS]
    return tuple(_group(packed, int(labels[at])) for at in largest if counts[at] > 1)


def _group(packed: PackedRows, label: int) -> DuplicateGroup:
    rows = np.flatnonzero(packed.decision.alike == label)
    texts = list(packed.gathered.spool.texts(rows[:SHOWN_LOCATIONS].tolist()))
    equal = len(np.unique(packed.decision.equal[rows])) == 1
    return DuplicateGroup(tuple(row["where"] for row in texts), text_of(texts[0])[:SHOWN_CHARACTERS], equal, len(rows))


def _locations(packed: PackedRows, rows: NDArray[np.bool_]) -> tuple[str, ...]:
    wanted = np.flatnonzero(rows)[:SHOWN_LOCATIONS].tolist()
    return tuple(row["where"] for row in packed.gathered.spool.texts(wanted))


def _rows(packed: PackedRows, index: int, example: Example, row: Rendered) -> Iterator[RowAudit]:
    """Yield the text that is trained on; of a preference pair, both answers, one after the other."""
    decision = packed.decision
    split = SIDES[decision.sides[index]] if decision.losses[index] == KEPT else DROPPED
    documents = documents_of(example, row)
    names = ("chosen", "rejected") if len(documents) == 2 else (_verdict(example),)
    for name, (_, document) in zip(names, documents):
        what = f", {name}: {np.count_nonzero(document.supervised):,} supervised tokens" if name else ""
        yield RowAudit(f"{example.where}{what}", split, tuple(_pieces(packed.gathered.renderer, document)))


def _verdict(example: Example) -> str:
    return "" if example.desirable is None else "a good answer" if example.desirable else "a bad answer"


def _pieces(renderer: Renderer, row: Rendered) -> Iterator[tuple[str, bool]]:
    for supervised, run in groupby(zip(row.ids, row.supervised.tolist()), key=lambda pair: pair[1]):
        yield renderer.tokenizer.decode([token for token, _ in run]), bool(supervised)
