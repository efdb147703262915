"""What `packhorse check` finds: the same way through the data as `prepare`, with a score card of each source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.audit_report import AuditReport, DuplicateGroup, RowAudit, SourceAudit, SplitAudit
from packhorse.data.checks.scorecard import MOST_SAMPLES, Sample, ScoreCard, ScoreKeeper, make_sample
from packhorse.data.decide import KEPT
from packhorse.data.formats.example import Example
from packhorse.data.gather import Gathered
from packhorse.data.ledger import SIDES
from packhorse.data.render.render import Rendered, Renderer
from packhorse.data.resolve import resolve_tokenizer
from packhorse.data.settle import Settled, fill, settle
from packhorse.data.source_pass import SourceGathered
from packhorse.data.spool import text_of
from packhorse.recipe.schema import Recipe

SHOWN_ROWS: Final = 12
SHOWN_ROWS_OF_A_SOURCE: Final = 4
SHOWN_GROUPS: Final = 10
SHOWN_PLACES: Final = 20
SHOWN_CHARACTERS: Final = 160
PERCENTILES: Final = (0, 50, 90, 99, 100)
MOST_BINS: Final = 28
LEFT_OUT: Final = "left out"

Int64 = NDArray[np.int64]


def audit(recipe: Recipe) -> AuditReport:
    """Read, render and check every row, and write nothing that stays.

    Raises:
        UserError: The same as `prepare` would raise.
    """
    watch = _Watch()
    with TemporaryDirectory(prefix="packhorse-check-") as folder:
        settled = settle(recipe, Path(folder) / "spool", watch, with_prompts=True)
        return _report(recipe, settled, watch)


class _Watch:
    """Looks at rows as they pass: keeps the score of each source, and the first rows of all."""

    def __init__(self) -> None:
        # By the source itself: two may be called alike, such as subsets of one hub data set.
        self.keepers: dict[SourceGathered, ScoreKeeper] = {}
        self.rows: list[tuple[int, Example, Rendered]] = []
        self._num_seen = 0
        self._source: SourceGathered | None = None
        self._num_wanted = 0

    def __call__(self, found: SourceGathered, examples: Sequence[Example], rendered: Sequence[Rendered]) -> None:
        keeper = self.keepers.setdefault(found, ScoreKeeper(found.name))
        keeper.add(examples, [len(row.ids) for row in rendered])
        if found is not self._source:
            self._source, self._num_wanted = found, SHOWN_ROWS_OF_A_SOURCE
        wanted = min(self._num_wanted, SHOWN_ROWS - len(self.rows))
        self._num_wanted -= min(wanted, len(examples))
        self.rows += [
            (self._num_seen + at, example, row) for at, (example, row) in enumerate(zip(examples[:wanted], rendered))
        ]
        self._num_seen += len(examples)


def _report(recipe: Recipe, settled: Settled, watch: _Watch) -> AuditReport:
    gathered, decision = settled.gathered, settled.decision
    lengths = gathered.spool.columns.tokens
    at = np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()
    supervised = gathered.spool.supervised()
    return AuditReport(
        name=recipe.name,
        tokenizer=resolve_tokenizer(recipe).name,
        template=recipe.data.template,
        stop_token=gathered.renderer.tokenizer.eos_token,
        length_tokens=recipe.batch.length,
        sources=tuple(_source(gathered, number) for number in range(len(gathered.sources))),
        ledger=settled.fitted.ledger,
        splits={side: _split(settled, side, recipe) for side in settled.packings},
        shares=decision.shares,
        shares_reason=decision.shares_reason,
        length_percentiles=dict(zip(PERCENTILES, at)),
        length_histogram=length_histogram(lengths),
        num_tokens=int(lengths.sum()),
        supervised_share=float(np.count_nonzero(supervised) / len(supervised)),
        cards=tuple(_card(settled, number, watch) for number in range(len(gathered.sources))),
        duplicates=_largest_groups(settled),
        num_contaminated=decision.findings["contaminated"],
        contaminated=_places(settled, gathered.spool.columns.contaminated),
        notes=settled.notes,
        # What the test set holds is for no eye before the end.
        rows=tuple(row for seen in watch.rows if (row := _row(settled, *seen)).split != "test"),
    )


def _source(gathered: Gathered, number: int) -> SourceAudit:
    found = gathered.sources[number]
    num_rows = int(np.count_nonzero(gathered.spool.columns.source == number)) + found.mistakes.num_rows
    return SourceAudit(found.name, found.row_format, num_rows, found.use)


def _split(settled: Settled, side: str, recipe: Recipe) -> SplitAudit:
    documents, packing = settled.side(side), settled.packings[side]
    rows = settled.decision.sides == SIDES.index(side)
    counts = np.bincount(settled.gathered.spool.columns.stratum[rows], minlength=len(settled.gathered.strata))
    return SplitAudit(
        num_rows=int(np.count_nonzero(rows)),
        num_tokens=int(documents.lengths.sum()),
        num_packs=packing.num_packs,
        fill=fill(documents, packing, recipe.batch.length),
        strata={name: int(count) for name, count in zip(settled.gathered.strata, counts) if name and count},
    )


def length_histogram(lengths: Int64) -> tuple[tuple[int, int], ...]:
    """Return (upper bound, rows) of bins whose bounds grow by a steady factor, from the shortest row to the longest."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    bounds = np.unique(np.geomspace(shortest, max(longest, shortest + 1), MOST_BINS).round().astype(np.int64))
    bins = np.searchsorted(bounds, lengths)
    return tuple(zip(bounds.tolist(), np.bincount(bins, minlength=len(bounds)).tolist()))


def _card(settled: Settled, number: int, watch: _Watch) -> ScoreCard:
    decision, columns = settled.decision, settled.gathered.spool.columns
    here = columns.source == number
    copies, alike = _later_rows(decision.equal), _later_rows(decision.alike)
    found = settled.gathered.sources[number]
    keeper = watch.keepers.get(found) or ScoreKeeper(found.name)
    return keeper.card(
        exact_duplicates=int(np.count_nonzero(copies & here)),
        near_duplicates=int(np.count_nonzero(alike & ~copies & here)),
        contradictions=int(np.count_nonzero(decision.contradicting & here)),
        contradicting=_samples(settled, decision.contradicting & here),
    )


def _samples(settled: Settled, rows: NDArray[np.bool_]) -> list[Sample]:
    wanted = np.flatnonzero(rows)[:MOST_SAMPLES].tolist()
    return [make_sample(row["where"], text_of(row)) for row in settled.gathered.spool.texts(wanted)]


def _later_rows(labels: Int64) -> NDArray[np.bool_]:
    """Return bool [R]: the rows that are not the first of their label, which is the index of its first row."""
    return np.asarray(labels != np.arange(len(labels)))


def _largest_groups(settled: Settled) -> tuple[DuplicateGroup, ...]:
    labels = settled.decision.alike
    found, counts = np.unique(labels, return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:SHOWN_GROUPS]
    return tuple(_group(settled, int(found[at])) for at in largest if counts[at] > 1)


def _group(settled: Settled, label: int) -> DuplicateGroup:
    rows = np.flatnonzero(settled.decision.alike == label)
    texts = list(settled.gathered.spool.texts(rows[:SHOWN_PLACES].tolist()))
    equal = len(np.unique(settled.decision.equal[rows])) == 1
    return DuplicateGroup(tuple(row["where"] for row in texts), text_of(texts[0])[:SHOWN_CHARACTERS], equal, len(rows))


def _places(settled: Settled, rows: NDArray[np.bool_]) -> tuple[str, ...]:
    wanted = np.flatnonzero(rows)[:SHOWN_PLACES].tolist()
    return tuple(row["where"] for row in settled.gathered.spool.texts(wanted))


def _row(settled: Settled, index: int, example: Example, row: Rendered) -> RowAudit:
    decision = settled.decision
    split = SIDES[decision.sides[index]] if decision.losses[index] == KEPT else LEFT_OUT
    return RowAudit(example.where, split, tuple(_pieces(settled.gathered.renderer, row)))


def _pieces(renderer: Renderer, row: Rendered) -> Iterator[tuple[str, bool]]:
    for supervised, run in groupby(zip(row.ids, row.supervised.tolist()), key=lambda pair: pair[1]):
        yield renderer.tokenizer.decode([token for token, _ in run]), bool(supervised)
