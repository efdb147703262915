"""Score cards as sentences: findings, the number of rows, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from packhorse.data.checks.counters import Sample
from packhorse.data.checks.scorecard import FEW_ROWS, ScoreCard
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


def _diversity(card: ScoreCard) -> Iterator[tuple[str, int, tuple[str, str], str, str]]:
    few = card.num_rows if card.num_rows < FEW_ROWS else 0
    whole = f"the whole source, which has fewer than {FEW_ROWS} rows"
    yield "few_rows", few, ("is", "are"), whole, "add rows: a few are learned by heart, and measure little"
    repeats = "a prompt, and fewer than half of the prompts are distinct"
    yield "repeated_prompts", card.repeated_prompts, ("repeats", "repeat"), repeats, "vary the prompts"
    opening = "with the same five words, as at least half of the prompts do"
    advice = "vary them, unless users will write so too"
    yield "same_opening", card.same_opening, ("begins", "begin"), opening, advice


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
    removed = "they are dropped" if "leaked" in ledger.losses else "data.duplicates.leaks: drop removes them"
    yield "leaks", card.leaks, be, "also in given held-out rows", removed
    yield "contradictions", card.contradictions, have, other, "keep the right one"
    yield "short_answers", card.short_answers, have, "an answer of fewer than two words", "is it an answer?"
    yield "length_outliers", card.length_outliers, be, "far longer than the others", "is it one row, as intended?"
    yield "unanswered", card.unanswered, ("ends", "end"), "in a turn that nothing answers", "remove it, or answer it"
    yield "placeholders", card.placeholders, have, "a placeholder such as {{name}} in trained text", "fill it in"
    yield from _diversity(card)
    if not card.personal:
        yield PERSONAL, 0, have, "personal data or a secret", ""
    for kind, rows in card.personal.items():
        yield f"{PERSONAL}:{kind}", rows, ("holds", "hold"), kind_words(kind), "masked in the score card, not in packs"
    damage = ("looks", "look"), "wrongly decoded", "data.fix_encoding: true fixes them"
    yield "broken_encoding", card.broken_encoding, *damage
