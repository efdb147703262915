"""A score card in words: what is not as it might be, how many rows, what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from packhorse.data.checks.scorecard import Sample, ScoreCard
from packhorse.data.ledger import Entry, Ledger

PERSONAL: Final = "personal"
_KINDS: Final[Mapping[str, str]] = {
    "email": "an email address",
    "phone": "a phone number",
    "iban": "a bank account number (IBAN)",
    "credit_card": "a credit card number",
    "ip_address": "an IP address",
    "private_key": "a private key",
}


@dataclass(frozen=True)
class Finding:
    """One kind of finding in one source.

    Attributes:
        name: As `ScoreCard.samples` calls it.
        rows: Rows that have it.
        words: What they are or have, to stand after the number of rows: `are a copy of an earlier row`.
        advice: What can be done, in the recipe's words.
        samples: Some of the rows.
    """

    name: str
    rows: int
    words: str
    advice: str
    samples: tuple[Sample, ...]

    @property
    def sentence(self) -> str:
        """Number and meaning, such as `35 rows are a copy of an earlier row`."""
        return f"{self.rows:,} {'row' if self.rows == 1 else 'rows'} {self.words}"


def findings(card: ScoreCard, ledger: Ledger) -> tuple[Finding, ...]:
    """Return what a source's card has found, without what is 0."""
    return tuple(finding for finding in measures(card, ledger) if finding.rows > 0)


def measures(card: ScoreCard, ledger: Ledger) -> tuple[Finding, ...]:
    """Return all that a source's card looks for, also what is 0."""
    return tuple(
        Finding(name, rows, f"{verbs[rows != 1]} {words}", advice, card.samples.get(name, ()))
        for name, rows, verbs, words, advice in _told(card, ledger)
    )


def kind_words(kind: str) -> str:
    """Return a kind of personal data as a person says it."""
    return _KINDS.get(kind, kind.replace("_", " "))


def _told(card: ScoreCard, ledger: Ledger) -> Iterator[tuple[str, int, tuple[str, str], str, str]]:
    """Yield name, rows, verb for one and for many, what they have, advice."""
    dropped = ledger.losses.get("duplicate", Entry()).rows
    # The card does not say which copies of which source went, the ledger says how many of all did.
    exact, near = (
        f"in all, {dropped:,} copies are left out" if dropped else f"data.duplicates.{kind}: drop keeps one of each"
        for kind in ("exact", "near")
    )
    be, have = ("is", "are"), ("has", "have")
    yield "exact_duplicates", card.exact_duplicates, be, "a copy of an earlier row", exact
    yield "near_duplicates", card.near_duplicates, be, "nearly a copy of an earlier row", near
    other = "a prompt that stands elsewhere with another answer"
    yield "contradictions", card.contradictions, have, other, "keep the right one"
    yield "short_answers", card.short_answers, have, "an answer of fewer than two words", "is it an answer?"
    yield "length_outliers", card.length_outliers, be, "far longer than the others", "is it one row, and meant?"
    if not card.personal:
        yield PERSONAL, 0, have, "personal data or a secret in them", ""
    for kind, rows in card.personal.items():
        yield f"{PERSONAL}:{kind}", rows, ("holds", "hold"), kind_words(kind), "masked in the score card, not in packs"
    damage = ("looks", "look"), "wrongly decoded", "data.fix_encoding: true mends them"
    yield "broken_encoding", card.broken_encoding, *damage
