"""Score card of a source: counts that the user should see before training; none of them refuses a row."""

from __future__ import annotations

import heapq
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from packhorse.data.checks.counters import (
    MOST_SAMPLES,
    FieldCounter,
    OpeningCounter,
    RowCounter,
    Sample,
    ValueCounter,
    make_sample,
)
from packhorse.data.checks.encoding import first_damage
from packhorse.data.checks.language import languages
from packhorse.data.checks.personal import find_personal
from packhorse.data.checks.texts import answer_start, prompt_text, row_text
from packhorse.data.formats.example import Example

FEW_ROWS: Final = 30
"""A source with fewer rows is reported."""
MOST_LABELS: Final = 1000
"""A field with more values than this is not a label."""
LABEL_FIELDS: Final = ("label", "category", "class", "intent")
# Neither a group of LaTeX nor an expression of a GitHub workflow.
PLACEHOLDER: Final = re.compile(r"(?<![$\\{}\w])\{\{ ?[A-Za-z_][\w .-]{1,60}\}\}(?!\})")
_UNSPACED: Final = "\u2e80"
"""From this character on, scripts have no spaces between words, and a character is about a word."""


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
        length_outliers: Rows above the upper outer fence of the lengths, Q3 + 3 IQR (Tukey 1977), and more than
            twice as long as the median: where most rows have one length, the fence alone is too low.
        personal: Kind of personal data or secret to rows that contain it.
        broken_encoding: Rows with wrongly decoded text.
        samples: Name of the finding (an attribute's name, or `personal:KIND`) to a few rows.
        leaks: Rows that are also in a given split of held-out rows.
        unanswered: Chats whose last turn is not the assistant's.
        placeholders: Rows with a placeholder such as `{{name}}` in text that is trained on.
        repeated_prompts: Rows with the prompt of an earlier row; 0 if at least half of the prompts are distinct.
        same_opening: Rows whose prompts begin with the same five words; 0 if fewer than half of the prompts do.
        strata: Name of a field to its values and their rows, for fields with few values, such as `style`; the values of
            a confidence between 0 and 1 are tenths.
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
    leaks: int = 0
    unanswered: int = 0
    placeholders: int = 0
    repeated_prompts: int = 0
    same_opening: int = 0
    strata: dict[str, dict[str, int]] = field(default_factory=dict)


class ScoreKeeper:
    """Collects a source's score card over batches of rows, with 4 bytes per row, bounded counters and a few samples."""

    def __init__(self, source: str, trained_roles: Sequence[str] = ("assistant",)) -> None:
        self._source, self._trained_roles = source, trained_roles
        self._tokens = array("I")
        self._languages: Counter[str] = Counter()
        self._labels = {name: ValueCounter(MOST_LABELS) for name in LABEL_FIELDS}
        self._answers = ValueCounter(MOST_LABELS)
        self._num_answers = 0
        self._empty, self._short, self._broken = RowCounter(), RowCounter(), RowCounter()
        self._unanswered, self._placeholders = RowCounter(), RowCounter()
        self._fields, self._openings = FieldCounter(), OpeningCounter()
        self._personal: dict[str, RowCounter] = {}
        self._longest: list[tuple[int, int, Sample]] = []

    def add(self, examples: Sequence[Example], tokens: Sequence[int]) -> None:
        """Add a batch of rows and their lengths in tokens."""
        texts = [row_text(example) for example in examples]
        self._languages.update(languages(texts))
        for example, text, num_tokens in zip(examples, texts, tokens):
            self._add_labels(example)
            self._fields.add(example.fields)
            self._add_answer(example, text)
            self._add_prompt(example, text)
            self._add_trained(example)
            self._add_long(example.where, text, num_tokens)
            damage = first_damage(text)
            if damage is not None:
                self._broken.add(example.where, text, text[damage])
            for kind in {kind for kind, _, _ in find_personal(text)}:
                self._personal.setdefault(kind, RowCounter()).add(example.where, text, f"[{kind}]")

    def card(
        self,
        exact_duplicates: int,
        near_duplicates: int,
        contradictions: int,
        contradicting: Sequence[Sample] = (),
        leaks: int = 0,
        repeated_prompts: int = 0,
    ) -> ScoreCard:
        """Return the card, with the figures that are known only over all rows.

        Args:
            exact_duplicates: Rows that are a copy of an earlier one.
            near_duplicates: Rows that are nearly a copy of an earlier one.
            contradictions: Rows whose prompt another row answers differently.
            contradicting: Samples of those rows.
            leaks: Rows that are also in a given split of held-out rows.
            repeated_prompts: Rows with the prompt of an earlier row, if fewer than half of the prompts are distinct.
        """
        outliers, longest = self._outliers()
        opening = self._openings.most_frequent()
        label_field, labels = self._label_counts()
        # If most answers are one word, one word is expected; an empty answer never is.
        short = () if self._answers_are_labels() else (self._short,)
        samples = {
            "contradictions": list(contradicting),
            "short_answers": [sample for finding in (self._empty, *short) for sample in finding.samples],
            "length_outliers": longest,
            **{f"personal:{kind}": finding.samples for kind, finding in self._personal.items()},
            "broken_encoding": self._broken.samples,
            "unanswered": self._unanswered.samples,
            "placeholders": self._placeholders.samples,
            "same_opening": opening.samples,
        }
        personal = {kind: finding.count for kind, finding in self._personal.items()}
        return ScoreCard(
            source=self._source,
            num_rows=len(self._tokens),
            languages=dict(self._languages.most_common()),
            labels=labels,
            exact_duplicates=exact_duplicates,
            near_duplicates=near_duplicates,
            contradictions=contradictions,
            short_answers=self._empty.count + sum(finding.count for finding in short),
            length_outliers=outliers,
            personal=dict(sorted(personal.items(), key=lambda item: (-item[1], item[0]))),
            broken_encoding=self._broken.count,
            samples={name: tuple(kept[:MOST_SAMPLES]) for name, kept in samples.items() if kept},
            leaks=leaks,
            unanswered=self._unanswered.count,
            placeholders=self._placeholders.count,
            repeated_prompts=repeated_prompts,
            same_opening=opening.count,
            strata=self._fields.strata(besides=label_field),
        )

    def _add_labels(self, example: Example) -> None:
        for name, labels in self._labels.items():
            if name in example.fields:
                labels.add(str(example.fields[name]))

    def _add_prompt(self, example: Example, text: str) -> None:
        turns = example.messages
        if turns is None:
            return
        if turns[-1].role != "assistant":
            self._unanswered.add(example.where, text)
        self._openings.add(prompt_text(example), example.where, text)

    def _add_trained(self, example: Example) -> None:
        turns = example.messages
        trained = [turn.content for turn in turns or () if turn.trained and turn.role in self._trained_roles]
        for text in trained if turns is not None else [example.text or ""]:
            found = PLACEHOLDER.search(text)
            if found is not None:
                self._placeholders.add(example.where, text, found[0])
                return

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
        fence = max(third + 3 * (third - first), 2 * np.median(lengths))
        longest = [sample for num, _, sample in sorted(self._longest, key=lambda row: row[:2]) if num > fence]
        return int(np.count_nonzero(lengths > fence)), longest[::-1]

    def _answers_are_labels(self) -> bool:
        return 2 * self._short.count > self._num_answers

    def _label_counts(self) -> tuple[str, dict[str, int]]:
        """Return the name of the field with the labels, empty for labels that are answers, and the rows of each."""
        for name, labels in self._labels.items():
            if counts := labels.counts():
                return name, counts
        return "", self._answers.counts() if self._answers_are_labels() else {}


def _num_words(text: str) -> int:
    return len(text) if max(text) >= _UNSPACED else len(text.split())
