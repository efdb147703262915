"""data.html: one self-contained page with the results of an audit, without scripts or external requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from packhorse.data.audit_report import AuditReport, DuplicateGroup, RowAudit, SourceAudit
from packhorse.data.checks.scorecard import ScoreCard
from packhorse.data.ledger import SIDES, Entry
from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.report.balance import balance
from packhorse.report.findings import Finding, findings, measures
from packhorse.report.histogram import PLOT_HEIGHT, histogram
from packhorse.report.ledger_lines import ledger_lines
from packhorse.report.readable import clipped, readable

TEMPLATE: Final = "data_page.html.jinja"
# Long texts are cut so that the page opens quickly.
LONGEST_PIECE_CHARACTERS: Final = 6_000
LONGEST_COPY_CHARACTERS: Final = 600
LONGEST_KEY_CHARACTERS: Final = 80
SHOWN_LOCATIONS: Final = 8
SHOWN_LABELS: Final = 12
_NEWLINE: Final = Markup('<span class="newline" aria-hidden="true"></span>\n')


@dataclass(frozen=True)
class Tile:
    """One key figure: label, value, and a line below it."""

    label: str
    value: str
    below: str


@dataclass(frozen=True)
class Count:
    """Rows of a label or a language, and the length of its bar in percent of the longest."""

    name: str
    rows: int
    share: float
    bar: float


@dataclass(frozen=True)
class CardView:
    """A score card with what the page shows of it."""

    card: ScoreCard
    source: SourceAudit | None
    measures: tuple[Finding, ...]
    languages: tuple[Count, ...]
    labels: tuple[Count, ...]
    strata: tuple[tuple[str, tuple[Count, ...]], ...]


def environment_of_pages() -> Environment:
    """Return the environment that all pages share: text is escaped, and its hidden characters are visible."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_readable_text,
    )
    environment.filters.update(num="{:,}".format, pct=_percent)
    return environment


def render_data_page(report: AuditReport) -> str:
    """Return the page as HTML; all text of rows and names is escaped."""
    environment = environment_of_pages()
    environment.filters.update(points=_points, lines=_lines, clipped=_clipped_key)
    return environment.get_template(TEMPLATE).render(
        report=report,
        tiles=_tiles(report),
        lines=ledger_lines(report.ledger),
        sides=[(side, report.splits[side]) for side in SIDES if side in report.splits],
        balance=balance(report.splits, report.shares),
        requested=_requested(report),
        rows=[_clipped_row(row) for row in report.rows],
        groups=[_clipped_group(group) for group in report.duplicates],
        histogram=histogram(report.length_histogram, report.length_tokens),
        plot_height=PLOT_HEIGHT,
        cards=_cards(report),
        shown_locations=SHOWN_LOCATIONS,
        shown_labels=SHOWN_LABELS,
    )


def write_data_page(report: AuditReport, path: Path) -> None:
    """Write the page atomically, and replace an earlier one.

    Raises:
        UserError: The folder cannot be written.
    """
    page = render_data_page(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page, writer=f".draft-{os.getpid()}")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}.",
            "the page shows what the audit found in the data.",
            "free space there, or set runs_folder to a folder where you may write.",
        ) from error


def _readable_text(value: object) -> object:
    """Make hidden characters visible; markup that is HTML already has its own class and stays unchanged."""
    return readable(value) if type(value) is str else value


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _lines(text: str) -> Markup:
    """Return text with a sign before each newline, so that newlines that are trained on are visible."""
    return _NEWLINE.join(readable(line) for line in text.split("\n"))


def _points(deviation: float) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    shown = f"{abs(deviation) * 100:.1f}"
    if shown == "0.0":
        return "±0.0"
    return f"{'+' if deviation > 0 else '−'}{shown}"


def _tiles(report: AuditReport) -> Iterator[Tile]:
    ledger, percentiles = report.ledger, report.length_percentiles
    train = report.splits.get("train")
    dropped = ledger.rows_in.rows - ledger.rows_kept
    lost = f"{dropped:,} dropped" if dropped else "none dropped"
    yield Tile("Rows read", f"{ledger.rows_in.rows:,}", f"{ledger.rows_kept:,} kept, {lost}")
    if train is not None:
        yield Tile(
            "Trained on", f"{train.num_rows:,}", f"rows, in {train.num_packs:,} packs, {100 * train.fill:.2f} % full"
        )
    yield Tile("Supervised", f"{_percent(report.supervised_share)}", f"of {report.num_tokens:,} tokens")
    if percentiles:
        below = f"tokens; 99 % up to {percentiles[99]:,}, longest {percentiles[100]:,}"
        yield Tile("Median row", f"{percentiles[50]:,}", below)
    # Each value of data.over_long counts such rows in one of these three.
    over = ledger.losses.get("over_long", Entry()).rows + ledger.truncated + ledger.split_rows
    yield Tile("Longer than T", f"{over:,}", f"rows longer than {report.length_tokens:,} tokens")
    num_rows = sum(finding.rows for card in report.cards for finding in findings(card, ledger))
    yield Tile("Findings", f"{num_rows:,}", "in the score cards below" if num_rows else "nothing in the score cards")


def _requested(report: AuditReport) -> str:
    return ", ".join(f"{side} {100 * share:g} %" for side, share in zip(SIDES, report.shares) if share > 0)


def _clipped_key(key: str) -> str:
    return clipped(key, LONGEST_KEY_CHARACTERS)


def _clipped_row(row: RowAudit) -> RowAudit:
    pieces = tuple((clipped(text, LONGEST_PIECE_CHARACTERS), supervised) for text, supervised in row.pieces)
    return replace(row, pieces=pieces)


def _clipped_group(group: DuplicateGroup) -> DuplicateGroup:
    return replace(group, text=clipped(group.text, LONGEST_COPY_CHARACTERS))


def _cards(report: AuditReport) -> Iterator[CardView]:
    by_name = {source.name: source for source in report.sources}
    for card in report.cards:
        yield CardView(
            card,
            by_name.get(card.source),
            measures(card, report.ledger),
            tuple(_counts(card.languages)),
            tuple(_counts(card.labels)),
            tuple((name, tuple(_counts(values))) for name, values in card.strata.items()),
        )


def _counts(rows_by_name: dict[str, int]) -> Iterator[Count]:
    total, most = sum(rows_by_name.values()), max(rows_by_name.values(), default=0)
    for name, rows in rows_by_name.items():
        yield Count(name, rows, rows / total if total else 0.0, 100 * rows / most if most else 0.0)
