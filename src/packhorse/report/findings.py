"""Score cards as sentences: findings, the number of rows, and what to do about them."""

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
        name: Key in `ScoreCard.samples`.
        rows: Rows with the finding.
        words: Predicate after the number of rows, such as `are a copy of an earlier row`.
        advice: What the user can do.
        samples: Some of the rows.
    """

    name: str
    rows: int
    words: str
    advice: str
    samples: tuple[Sample, ...]

    @property
    def sentence(self) -> str:
        """Number of rows and predicate, such as `35 rows are a copy of an earlier row`."""
        return f"{self.rows:,} {'row' if self.rows == 1 else 'rows'} {self.words}"


def findings(card: ScoreCard, ledger: Ledger) -> tuple[Finding, ...]:
    """Return the findings of a source's card with at least one row."""
    return tuple(finding for finding in measures(card, ledger) if finding.rows > 0)


def measures(card: ScoreCard, ledger: Ledger) -> tuple[Finding, ...]:
    """Return all findings that a source's card looks for, with those of 0 rows."""
    return tuple(
        Finding(name, rows, f"{verbs[rows != 1]} {words}", advice, card.samples.get(name, ()))
        for name, rows, verbs, words, advice in _measured(card, ledger)
    )


def kind_words(kind: str) -> str:
    """Return a kind of personal data in words."""
    return _KINDS.get(kind, kind.replace("_", " "))


def _measured(card: ScoreCard, ledger: Ledger) -> Iterator[tuple[str, int, tuple[str, str], str, str]]:
    """Yield name, rows, verb for one row and for several, object, advice."""
    dropped = ledger.losses.get("duplicate", Entry()).rows
    # The card does not know which copies were dropped; the ledger has their number over all sources.
    exact, near = (
        f"in total, {dropped:,} copies are dropped" if dropped else f"data.duplicates.{kind}: drop keeps one of each"
        for kind in ("exact", "near")
    )
    be, have = ("is", "are"), ("has", "have")
    yield "exact_duplicates", card.exact_duplicates, be, "a copy of an earlier row", exact
    yield "near_duplicates", card.near_duplicates, be, "nearly a copy of an earlier row", near
    other = "a prompt that another row answers differently"
    yield "contradictions", card.contradictions, have, other, "keep the right one"
    yield "short_answers", card.short_answers, have, "an answer of fewer than two words", "is it an answer?"
    yield "length_outliers", card.length_outliers, be, "far longer than the others", "is it one row, as intended?"
    if not card.personal:
        yield PERSONAL, 0, have, "personal data or a secret", ""
    for kind, rows in card.personal.items():
        yield f"{PERSONAL}:{kind}", rows, ("holds", "hold"), kind_words(kind), "masked in the score card, not in packs"
    damage = ("looks", "look"), "wrongly decoded", "data.fix_encoding: true fixes them"
    yield "broken_encoding", card.broken_encoding, *damage
