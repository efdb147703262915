"""Rows that hold what an evaluation asks: runs of words that stand in both (Brown et al. 2020, app. C)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.words import runs, word_hashes

_NO_WORD: Final = re.compile(r"[\W_]+")
_ASCII_WORDS: Final = bytes(byte if chr(byte).isalnum() and byte < 128 else 32 for byte in range(256))


class EvaluationIndex:
    """What an evaluation asks, to look rows up in.

    Case, punctuation and white space do not count. A text of fewer than `ngram` words is found where it is a whole row,
    or a whole line of one; so few words within other text say nothing.
    """

    def __init__(self, texts: Sequence[str], ngram: int) -> None:
        self._ngram = ngram
        hashes, offsets = word_hashes([_words(text) for text in texts])
        self._has_short = bool((np.diff(offsets) < ngram).any())
        self._known = np.unique(runs(hashes, offsets, ngram)[0])

    def hits(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> list[bool]:
        """Return for each row whether it shares `ngram` words in a row with one of the evaluation's.

        Args:
            texts: What each row says.
            prompts: What each row asks; only there are shorter questions looked for, as a label may well be the words
                of a short question. None: in the whole text.
        """
        found = self._found([_words(text) for text in texts])
        if self._has_short:
            lines = [(row, _words(line)) for row, text in enumerate(prompts or texts) for line in text.split("\n")]
            hits = np.flatnonzero(self._found([line for _, line in lines])).tolist()
            found[[lines[hit][0] for hit in hits]] = True
        return list(found.tolist())

    def _found(self, words: Sequence[bytes]) -> NDArray[np.bool_]:
        """Return bool [texts]: whether one of its runs of words is known."""
        found = np.zeros(len(words), np.bool_)
        if not len(self._known):
            return found
        grams, begin = runs(*word_hashes(words), self._ngram)
        places = np.minimum(np.searchsorted(self._known, grams), len(self._known) - 1)
        hits = np.flatnonzero(self._known[places] == grams)
        found[np.searchsorted(begin, hits, side="right") - 1] = True
        return found


def _words(text: str) -> bytes:
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS)
    return _NO_WORD.sub(" ", text.lower()).encode("utf-8", "surrogatepass")
