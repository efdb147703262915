"""Results of an audit or a preparation, for a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from rich.table import Table
from rich.text import Text

from packhorse.data.audit_report import AuditReport, RowAudit, SourceAudit, SplitAudit
from packhorse.data.data_manifest import SplitCounts
from packhorse.data.ledger import Ledger
from packhorse.report.findings import findings
from packhorse.report.ledger_lines import ledger_lines
from packhorse.report.readable import clipped, readable

LONGEST_PIECE_CHARACTERS: Final = 800
SHOWN_LOCATIONS: Final = 3
LONGEST_KEY: Final = 60


def figure_lines(report: AuditReport) -> list[tuple[str, str]]:
    """Return sources and figures as pairs of label and text."""
    lines = [line for source in report.sources for line in _source_lines(source)]
    percentiles = report.length_percentiles
    if percentiles:
        median, most, longest = (percentiles[percent] for percent in (50, 99, 100))
        text = f"median {median:,}, 99 % up to {most:,}, longest {longest:,} (T is {report.length_tokens:,})"
        lines.append(("tokens per row", text))
    lines.append(("supervised", f"{report.supervised_share:.1%} of {report.num_tokens:,} tokens"))
    lines.append(("stop token", f"{readable(report.stop_token)}, supervised at the end of each trained turn"))
    if report.shares_reason:
        lines.append(("shares", f"{_shares(report)}: {readable(report.shares_reason)}"))
    return lines


def _source_lines(source: SourceAudit) -> Iterator[tuple[str, str]]:
    yield "source", f"{readable(source.name)}: {source.num_rows:,} rows, {source.row_format}, for {source.use}"
    for group, counts in source.keys.items():
        if counts:
            listed = ", ".join(f"{readable(clipped(key, LONGEST_KEY))} {rows:,}" for key, rows in counts.items())
            yield f"keys {group}", listed


def ledger_table(ledger: Ledger) -> Table:
    """Return what happened to every row and token; the percentages add up to 100."""
    table = _table("ledger")
    for heading in ("rows", "of rows", "tokens", "of tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("read", f"{ledger.rows_in.rows:,}", "100.00 %", f"{ledger.rows_in.tokens:,}", "100.00 %")
    for line in ledger_lines(ledger):
        if line.rows or line.tokens:
            sign = "−" if line.is_loss else "="
            figures = (f"{line.rows:,}", line.rows_percent, f"{line.tokens:,}", line.tokens_percent)
            table.add_row(Text(f"{sign} {line.words}"), *figures)
    return table


def split_table(splits: Mapping[str, SplitAudit] | Mapping[str, SplitCounts]) -> Table:
    """Return rows, tokens, packs and fill of each side, and supervised tokens if they were counted."""
    table = _table("split")
    counted = any(isinstance(split, SplitCounts) for split in splits.values())
    for heading in ("rows", "tokens", *(["supervised"] if counted else []), "packs", "fill"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, split in splits.items():
        counts = [split.num_rows, split.num_tokens, split.num_packs]
        if isinstance(split, SplitCounts):
            counts.insert(2, split.num_supervised_tokens)
        table.add_row(name, *(f"{count:,}" for count in counts), f"{100 * split.fill:.2f} %")
    return table


def finding_lines(report: AuditReport) -> Table:
    """Return the findings of the score cards, one line per finding: rows, words, advice."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for card in report.cards:
        of_card = findings(card, report.ledger)
        if of_card:
            table.add_row("", Text(readable(card.source), style="dim"))
        for finding in of_card:
            table.add_row(f"{finding.rows:,}", Text(readable(f"{finding.words} ({finding.advice})")))
    if report.contaminated:
        table.add_row("", Text("contamination", style="dim"))
        table.add_row("", Text(readable(_contaminated(report))))
    if report.notes:
        table.add_row("", Text("notes", style="dim"))
    for note in report.notes:
        table.add_row("", Text(readable(note)))
    return table


def row_text(row: RowAudit, in_colour: bool, whole: bool = False) -> Text:
    """Return a row with its supervised text in green, or in brackets without colour; long pieces are cut or whole."""
    text = Text()
    for piece, supervised in row.pieces:
        shown = readable(piece if whole else clipped(piece, LONGEST_PIECE_CHARACTERS))
        if in_colour:
            text.append(shown, style="green" if supervised else "dim")
        else:
            text.append(f"⟦{shown}⟧" if supervised else shown)
    return text


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    return table


def _shares(report: AuditReport) -> str:
    named = zip(("train", "validation", "test"), report.shares)
    return ", ".join(f"{side} {100 * share:g} %" for side, share in named if share > 0)


def _contaminated(report: AuditReport) -> str:
    locations = ", ".join(report.contaminated[:SHOWN_LOCATIONS])
    more = f" and {rest:,} more" if (rest := report.num_contaminated - SHOWN_LOCATIONS) > 0 else ""
    return f"{locations}{more} contain text of data.decontaminate (data.decontaminate.action: drop removes them)"
