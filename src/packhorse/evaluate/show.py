"""A comparison as text for the terminal; fits 80 columns."""

from __future__ import annotations

from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from packhorse.data.seal import describe_looks
from packhorse.evaluate.results import Comparison, ComparisonLine, Sample
from packhorse.track.progress import describe_count

MAX_SAMPLE_CHARACTERS: Final = 240


def render(comparison: Comparison) -> RenderableType:
    """Return the table base → tuned, how often the test set was opened, and the sample answers."""
    looks = [Text(f"  {describe_looks(comparison.test_looks)}\n")] if comparison.test_looks else []
    samples = [_sample(number, sample) for number, sample in enumerate(comparison.samples, 1)]
    return Group(_table(comparison), *looks, *samples)


def _table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title="held-out rows: base → tuned", title_style="bold")
    table.add_column("rows of", overflow="fold", max_width=22)
    for name in ("rows", "loss", "perplexity", "exact match %", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, line in enumerate(comparison.lines):
        if number and line.group is None:
            table.add_section()
        table.add_row(*_cells(line), style="bold" if line.group is None else None)
    return table


def _cells(line: ComparisonLine) -> tuple[str | Text, ...]:
    base, tuned = line.base, line.tuned
    return (
        Text(line.set if line.group is None else f"  {line.group}"),
        str(line.num_rows),
        f"{base.loss:.2f} → {tuned.loss:.2f}",
        f"{_figure(base.perplexity)} → {_figure(tuned.perplexity)}",
        f"{_percent(base.exact_match)} → {_percent(tuned.exact_match)}",
        "" if line.exact_match_change is None else f"{100 * line.exact_match_change:+.1f}",
    )


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 100 else describe_count(value) if value < 1e9 else f"{value:.0e}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _sample(number: int, sample: Sample) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_header=False, title_justify="left", title_style="bold")
    table.title = Text(
        f"  sample {number} ({sample.set}, {sample.group})" if sample.group != sample.set else f"  sample {number}"
    )
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name in ("prompt", "expected", "base", "tuned"):
        table.add_row(name, Text(_shortened(getattr(sample, name))))
    return table


def _shortened(text: str) -> str:
    """Return short text without control characters, which an untrained model may generate."""
    plain = "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text.strip())
    return plain if len(plain) <= MAX_SAMPLE_CHARACTERS else plain[: MAX_SAMPLE_CHARACTERS - 1] + "…"
