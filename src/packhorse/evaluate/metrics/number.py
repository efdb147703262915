"""Metrics of numeric answers: the final number of a text."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from typing import Final

import regex

from packhorse.evaluate.metrics.metric import Expected, Metric, Reply

NUMBER: Final = regex.compile(r"[-−]?(?:\d{1,3}(?:[,\u00a0\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")
# Marks behind which the final answer is written: GSM8K, LaTeX, and plain English.
MARK: Final = regex.compile(r"####|\\boxed\s*\{|\b(?:final )?answer(?: is|:)", regex.IGNORECASE)
MAX_WORDS_AROUND: Final = 3
TOLERANCE: Final = Decimal("1e-6")


def final_number(text: str) -> Decimal | None:
    """Return the number behind the last mark (`####`, `\\boxed{`, `answer is`), or the last number of the text."""
    marks = list(MARK.finditer(text))
    if marks and (found := NUMBER.search(text, marks[-1].end())):
        return _value(found.group())
    numbers = NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def is_numeric(expected: str) -> bool:
    """Return whether an expected answer is a number: it marks a final one, or is one with a few words around it."""
    if any(NUMBER.search(expected, mark.end()) for mark in MARK.finditer(expected)):
        return True
    around = NUMBER.sub(" ", expected).split()
    return len(NUMBER.findall(expected)) == 1 and len(around) <= MAX_WORDS_AROUND


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.translate({ord(","): None, 0xA0: None, 0x202F: None, ord("−"): "-"}))
    except InvalidOperation:
        return None


def _number(expected: Expected, reply: Reply) -> float:
    if not is_numeric(expected.text):
        return math.nan
    truth, given = final_number(expected.text), final_number(reply.text)
    if truth is None:
        return math.nan
    if given is None or not reply.ended:
        return 0.0
    return float(abs(truth - given) <= TOLERANCE * max(Decimal(1), abs(truth)))


def _extracted(expected: Expected, reply: Reply) -> float:
    return float(final_number(reply.text) is not None) if is_numeric(expected.text) else math.nan


NUMBER_MATCH: Final = Metric("number", "binary", "%", _number)
EXTRACTED: Final = Metric("number_found", "binary", "%", _extracted)
