"""Metrics of text in any language: exact and normalised match, token F1, ROUGE-L, chrF and BLEU."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Final

import regex
import sacrebleu

from packhorse.data.checks.keys import normalised as without_punctuation
from packhorse.evaluate.metrics.metric import Expected, Metric, Reply

# Scripts without spaces between words: each character is a word, as sacrebleu's `zh` tokenizer does.
WORD: Final = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*|[\p{L}\p{M}\p{N}]+"
)
SACRE_CHRF: Final = sacrebleu.CHRF()
SACRE_BLEU: Final = sacrebleu.BLEU(effective_order=True, tokenize="intl")


def is_exact(expected: str, answer: str) -> bool:
    """Return whether the answer is the expected text, apart from white space at both ends."""
    return expected.strip() == answer.strip()


def normalised(text: str) -> str:
    """Return text in NFKC, without case and punctuation, with single spaces; the marks inside a number stay."""
    return without_punctuation(unicodedata.normalize("NFKC", text))


def words(text: str) -> list[str]:
    """Return the words of a text in any script, in NFKC and without case and punctuation."""
    found: list[str] = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return found


def token_f1(expected: str, answer: str) -> float:
    """Return the F1 of the words that both texts have, 0 to 1, counted with repetition (as SQuAD does)."""
    truth, given = words(expected), words(answer)
    return _f1(sum((Counter(truth) & Counter(given)).values()), len(truth), len(given))


def rouge_l(expected: str, answer: str) -> float:
    """Return ROUGE-L, 0 to 1: the F1 of the longest common subsequence of words (Lin 2004).

    Words are those of `words`. The package rouge-score keeps only a-z and 0-9, which gives 0 for Chinese.
    """
    truth, given = words(expected), words(answer)
    return _f1(_common_subsequence(truth, given), len(truth), len(given))


def _f1(common: int, num_truth: int, num_given: int) -> float:
    if not num_truth or not num_given:
        return float(num_truth == num_given)
    return 2 * common / (num_truth + num_given)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence (Hunt-Szymanski bit vectors, Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | (1 << index)
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(first) - row.bit_count()


def chrf(expected: str, answer: str) -> float:
    """Return sentence chrF2, 0 to 100, of sacrebleu."""
    return float(SACRE_CHRF.sentence_score(answer, [expected]).score)


def bleu(expected: str, answer: str) -> float:
    """Return sentence BLEU, 0 to 100, of sacrebleu with effective order and its international tokenizer."""
    return float(SACRE_BLEU.sentence_score(answer, [expected]).score)


def signature(name: str) -> str | None:
    """Return sacrebleu's signature of a metric, which a figure needs to be comparable; None for other metrics."""
    if name not in ("chrf", "bleu"):
        return None
    sacre = SACRE_CHRF if name == "chrf" else SACRE_BLEU
    sacre.sentence_score("a", ["a"])  # the number of references is part of the signature
    return str(sacre.get_signature())


def _exact(expected: Expected, reply: Reply) -> float:
    return float(reply.ended and is_exact(expected.text, reply.text))


def _normalised(expected: Expected, reply: Reply) -> float:
    return float(reply.ended and normalised(expected.text) == normalised(reply.text))


EXACT: Final = Metric("exact_match", "binary", "%", _exact)
NORMALISED: Final = Metric("normalised_match", "binary", "%", _normalised)
STOPPED: Final = Metric("stopped", "binary", "%", lambda _, reply: float(reply.ended))
TOKEN_F1: Final = Metric("token_f1", "graded", "%", lambda e, reply: token_f1(e.text, reply.text))
ROUGE_L: Final = Metric("rouge_l", "graded", "%", lambda e, reply: rouge_l(e.text, reply.text))
CHRF: Final = Metric("chrf", "graded", "points", lambda e, reply: chrf(e.text, reply.text))
BLEU: Final = Metric("bleu", "graded", "points", lambda e, reply: bleu(e.text, reply.text))
