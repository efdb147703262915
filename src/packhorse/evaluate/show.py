"""A comparison as text for the terminal; fits 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from packhorse.data.seal import describe_looks
from packhorse.evaluate.results import (
    Comparison,
    ComparisonLine,
    LabelResult,
    MetricResult,
    Sample,
    opinion_notes,
    shown_change,
    shown_value,
)
from packhorse.track.progress import describe_count

MAX_SAMPLE_CHARACTERS: Final = 240
STYLES: Final = {"better": "green", "worse": "red", "not finite": "red"}


def render(comparison: Comparison) -> RenderableType:
    """Return the table base → tuned with verdicts, the gate, and the sample answers."""
    looks = [f"  {describe_looks(comparison.test_looks)}\n"] if comparison.test_looks else []
    notes = [Text(note) for note in (*_notes(comparison), *_gate(comparison), *looks)]
    samples = [_sample(number, sample, comparison.reference) for number, sample in enumerate(comparison.samples, 1)]
    return Group(_table(comparison), *notes, *samples)


def _table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title_style="bold")
    table.title = Text(f"held-out rows (number): {comparison.reference} → tuned")
    table.add_column("metric", overflow="fold", min_width=18, max_width=24)
    for name in (f"{comparison.reference} → tuned", "change, 95 % interval"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", min_width=13)
    for line in comparison.lines:
        if line.group is None:
            table.add_section()
            table.add_row(Text(f"{line.set} ({line.num_rows})"), "", "", "", style="bold")
        for result in _shown(line):
            table.add_row(*_cells(line, result))
    return table


def _shown(line: ComparisonLine) -> list[MetricResult]:
    """Return all metrics of a set; of a group the metric of answers, or the loss if none was answered."""
    measured = [result for result in line.metrics if result.num_pairs or result.num_unscored]
    return measured if line.group is None else measured[-1:]


def _cells(line: ComparisonLine, result: MetricResult) -> tuple[str | Text, ...]:
    name = f"{result.metric} %" if result.unit == "%" else result.metric
    if result.num_unscored:
        name += f" ({result.num_pairs} rows)"
    change = ""
    if result.difference is not None:
        change = shown_change(result.difference, result.unit)
        if result.low is not None and result.high is not None:
            change += f" [{shown_change(result.low, result.unit)}, {shown_change(result.high, result.unit)}]"
    return (
        Text(f"  {name}" if line.group is None else f"    {line.group}"),
        f"{shown_value(result.base, result.unit)} → {shown_value(result.tuned, result.unit)}",
        change,
        Text(_verdict(result), style=STYLES.get(result.verdict, "")),
    )


def _verdict(result: MetricResult) -> str:
    if result.verdict == "cannot tell" and result.rows_needed and result.rows_needed > result.num_pairs:
        return f"cannot tell ({describe_count(result.rows_needed)})"
    if result.verdict == "too few" and result.num_pairs >= 10:
        return f"too few ({result.num_differing} differ)"
    return result.verdict


def _notes(comparison: Comparison) -> Iterator[str]:
    results = [result for line in comparison.lines for result in line.metrics if result.num_pairs]
    if tests := sorted({result.test for result in results}):
        yield f"  tests: {', '.join(tests)}; together at most 5 % wrong verdicts (Holm)."
    if any(result.verdict == "cannot tell" for result in results):
        points = 100 * comparison.smallest_effect
        yield f"  in brackets: rows that would show a change of {points:g} points, or of {points / 100:g} nats."
    yield from (f"  {note}" for note in comparison.notes)
    yield from (f"  {note}" for note in opinion_notes(comparison))
    for line in comparison.lines:
        if line.base_labels and line.tuned_labels:
            yield f"  labels of {line.set}: {_labels(line.base_labels)} → {_labels(line.tuned_labels)}."
    for failure in comparison.failures:
        yield f"  {failure.metric} raised {failure.error} on {failure.num_rows} rows, which have no value;"
        yield f"  the first: {_shortened(failure.first_row)[:60]}"


def _labels(labels: LabelResult) -> str:
    return f"macro F1 {100 * labels.macro_f1:.1f} %, accuracy {100 * labels.accuracy:.1f} %"


def _gate(comparison: Comparison) -> Iterator[str]:
    for result in comparison.gate:
        yield (f"  {result.role} · {result.set} {result.metric}: {result.condition}: {result.outcome}; {result.reason}")
    if comparison.decision:
        yield f"  gate: {comparison.decision}"


def _sample(number: int, sample: Sample, reference: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_header=False, title_justify="left", title_style="bold")
    table.title = Text(
        f"  sample {number} ({sample.set}, {sample.group})" if sample.group != sample.set else f"  sample {number}"
    )
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name in ("prompt", "expected", "base", "tuned"):
        table.add_row(reference if name == "base" else name, Text(_shortened(getattr(sample, name))))
    return table


def _shortened(text: str) -> str:
    """Return short text without control characters, which an untrained model may generate."""
    plain = "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text.strip())
    return plain if len(plain) <= MAX_SAMPLE_CHARACTERS else plain[: MAX_SAMPLE_CHARACTERS - 1] + "…"
