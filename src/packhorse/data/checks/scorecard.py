"""Score card of a source: counts that the user should see before training; none of them refuses a row."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from packhorse.data.checks.encoding import first_damage
from packhorse.data.checks.language import languages
from packhorse.data.checks.personal import find_personal, masked
from packhorse.data.checks.texts import answer_start, row_text
from packhorse.data.formats.example import Example

LABEL_FIELDS: Final = ("label", "category", "class", "intent")
MOST_LABELS: Final = 1000
"""A field with more values than this is not a label."""
MOST_SAMPLES: Final = 3
SAMPLE_CHARACTERS: Final = 120
_UNSPACED: Final = "\u2e80"
"""From this character on, scripts have no spaces between words, and a character is about a word."""


@dataclass(frozen=True)
class Sample:
    """A row with a finding: `file:line`, and at most 120 characters of its text, personal data masked."""

    where: str
    text: str


@dataclass(frozen=True)
class ScoreCard:
    """Score card of one source.

    Attributes:
        source: Name of the source in messages.
        num_rows: Rows that could be read.
        languages: Language code to rows, most frequent first.
        labels: Label to rows, most frequent first, if the rows have labels: a field, or short answers that repeat.
        exact_duplicates: Rows that are a copy of an earlier one.
        near_duplicates: Rows that are nearly a copy of an earlier one.
        contradictions: Rows whose prompt another row answers differently.
        short_answers: Rows with an empty answer, or with fewer than two words if most answers have more.
        length_outliers: Rows above the upper outer fence of the lengths, Q3 + 3 IQR (Tukey 1977).
        personal: Kind of personal data or secret to rows that contain it.
        broken_encoding: Rows with wrongly decoded text.
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


class _Finding:
    """Number of rows with a finding, and the first few of them."""

    def __init__(self) -> None:
        self.count = 0
        self.samples: list[Sample] = []

    def add(self, where: str, text: str, mark: str = "") -> None:
        self.count += 1
        if len(self.samples) < MOST_SAMPLES:
            self.samples.append(make_sample(where, text, mark))


class _Labels:
    """Counts of values, until there are too many to be labels."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._too_many = False

    def add(self, value: str) -> None:
        if not self._too_many:
            self._counts[value] += 1
            self._too_many = len(self._counts) > MOST_LABELS

    def counts(self) -> dict[str, int]:
        return {} if self._too_many else dict(self._counts.most_common())


class ScoreKeeper:
    """Collects a source's score card over batches of rows, with 4 bytes per row, bounded counters and a few samples."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = array("I")
        self._languages: Counter[str] = Counter()
        self._labels = {name: _Labels() for name in LABEL_FIELDS}
        self._answers = _Labels()
        self._num_answers = 0
        self._empty, self._short, self._broken = _Finding(), _Finding(), _Finding()
        self._personal: dict[str, _Finding] = {}
        self._longest: list[tuple[int, int, Sample]] = []

    def add(self, examples: Sequence[Example], tokens: Sequence[int]) -> None:
        """Add a batch of rows and their lengths in tokens."""
        texts = [row_text(example) for example in examples]
        self._languages.update(languages(texts))
        for example, text, num_tokens in zip(examples, texts, tokens):
            self._add_labels(example)
            self._add_answer(example, text)
            self._add_long(example.where, text, num_tokens)
            damage = first_damage(text)
            if damage is not None:
                self._broken.add(example.where, text, text[damage])
            for kind in {kind for kind, _, _ in find_personal(text)}:
                self._personal.setdefault(kind, _Finding()).add(example.where, text, f"[{kind}]")

    def card(
        self, exact_duplicates: int, near_duplicates: int, contradictions: int, contradicting: Sequence[Sample] = ()
    ) -> ScoreCard:
        """Return the card, with the figures that are known only over all rows.

        Args:
            exact_duplicates: Rows that are a copy of an earlier one.
            near_duplicates: Rows that are nearly a copy of an earlier one.
            contradictions: Rows whose prompt another row answers differently.
            contradicting: Samples of those rows.
        """
        outliers, longest = self._outliers()
        # If most answers are one word, one word is expected; an empty answer never is.
        short = () if self._answers_are_labels() else (self._short,)
        samples = {
            "contradictions": list(contradicting),
            "short_answers": [sample for finding in (self._empty, *short) for sample in finding.samples],
            "length_outliers": longest,
            **{f"personal:{kind}": finding.samples for kind, finding in self._personal.items()},
            "broken_encoding": self._broken.samples,
        }
        personal = {kind: finding.count for kind, finding in self._personal.items()}
        return ScoreCard(
            source=self._source,
            num_rows=len(self._tokens),
            languages=dict(self._languages.most_common()),
            labels=self._label_counts(),
            exact_duplicates=exact_duplicates,
            near_duplicates=near_duplicates,
            contradictions=contradictions,
            short_answers=self._empty.count + sum(finding.count for finding in short),
            length_outliers=outliers,
            personal=dict(sorted(personal.items(), key=lambda item: (-item[1], item[0]))),
            broken_encoding=self._broken.count,
            samples={name: tuple(kept[:MOST_SAMPLES]) for name, kept in samples.items() if kept},
        )

    def _add_labels(self, example: Example) -> None:
        for name, labels in self._labels.items():
            if name in example.fields:
                labels.add(str(example.fields[name]))

    def _add_answer(self, example: Example, text: str) -> None:
        turns = example.messages or ()
        at = answer_start(turns)
        if at == len(turns) or turns[at].tool_calls:
            return
        self._num_answers += 1
        answer = turns[at].content.strip()
        if not answer:
            self._empty.add(example.where, text)
        elif _num_words(answer) < 2:
            self._short.add(example.where, text)
            self._answers.add(answer)

    def _add_long(self, where: str, text: str, num_tokens: int) -> None:
        self._tokens.append(num_tokens)
        if len(self._longest) == MOST_SAMPLES and num_tokens <= self._longest[0][0]:
            return
        heapq.heappush(self._longest, (num_tokens, -len(self._tokens), make_sample(where, text)))
        if len(self._longest) > MOST_SAMPLES:
            heapq.heappop(self._longest)

    def _outliers(self) -> tuple[int, list[Sample]]:
        """Return the number of rows above the outer fence, and samples of the longest, longest first."""
        if not self._tokens:
            return 0, []
        lengths = np.array(self._tokens, np.uint32)
        first, third = np.percentile(lengths, (25, 75))
        fence = third + 3 * (third - first)
        longest = [sample for num, _, sample in sorted(self._longest, key=lambda row: row[:2]) if num > fence]
        return int(np.count_nonzero(lengths > fence)), longest[::-1]

    def _answers_are_labels(self) -> bool:
        return 2 * self._short.count > self._num_answers

    def _label_counts(self) -> dict[str, int]:
        fields = next((counts for labels in self._labels.values() if (counts := labels.counts())), {})
        return fields or (self._answers.counts() if self._answers_are_labels() else {})


def make_sample(where: str, text: str, mark: str = "") -> Sample:
    """Return a sample of at most 120 characters on one line, personal data masked; it includes `mark` if given."""
    # Masked before it is cut: half an address would not be recognised.
    line = " ".join(masked(text).split())
    start = max(0, line.find(mark) - SAMPLE_CHARACTERS // 3) if mark else 0
    shown = line[start : start + SAMPLE_CHARACTERS]
    before, after = "…" if start else "", "…" if start + len(shown) < len(line) else ""
    return Sample(where, before + shown[len(before) : len(shown) - len(after)] + after)


def _num_words(text: str) -> int:
    return len(text) if max(text) >= _UNSPACED else len(text.split())
