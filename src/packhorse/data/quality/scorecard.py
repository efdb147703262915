"""What the rows of a source are like: counts that a person should have seen before training, none of them a refusal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A row that shows a finding: `file:line`, and at most 120 characters of its text, personal data masked."""

    where: str
    text: str


@dataclass(frozen=True)
class ScoreCard:
    """One source.

    Attributes:
        source: As messages call it.
        num_rows: Rows that could be read.
        languages: Language code to rows, most frequent first.
        labels: Label to rows, most frequent first, where the rows have labels.
        exact_duplicates: Rows that are a copy of an earlier one.
        near_duplicates: Rows that nearly are.
        contradictions: Rows whose prompt stands elsewhere with another answer.
        short_answers: Rows whose answer has fewer than two words and is no label.
        length_outliers: Rows above the upper outer fence of the lengths, Q3 + 3 IQR (Tukey 1977).
        personal: Kind of personal data or secret to rows that hold it.
        broken_encoding: Rows with text that was decoded wrongly.
        samples: Name of the finding (an attribute's name, or `personal:KIND`) to a few rows.
    """

    source: str
    num_rows: int
    languages: dict[str, int]
    labels: dict[str, int]
    exact_duplicates: int
    near_duplicates: int
    contradictions: int
    short_answers: int
    length_outliers: int
    personal: dict[str, int]
    broken_encoding: int
    samples: dict[str, tuple[Sample, ...]]
