"""Find rows that contain text of an evaluation, by runs of words that both have (Brown et al. 2020, app. C)."""

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
    """Index of an evaluation's texts, to look rows up in.

    Case, punctuation and white space do not count. A text of fewer than `ngram` words matches only a whole row or a
    whole line of one; inside other text, so few words mean nothing.
    """

    def __init__(self, texts: Sequence[str], ngram: int) -> None:
        self._ngram = ngram
        hashes, offsets = word_hashes([_words(text) for text in texts])
        self._has_short = bool((np.diff(offsets) < ngram).any())
        self._known = np.unique(runs(hashes, offsets, ngram)[0])

    def hits(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> list[bool]:
        """Return for each row whether it shares a run of `ngram` words with the evaluation.

        Args:
            texts: Text of each row.
            prompts: Prompt of each row; short evaluation texts are searched only there, as a label may equal a short
                question by chance. None: in the whole text.
        """
        hits = self._has_known([_words(text) for text in texts])
        if self._has_short:
            lines = [(row, _words(line)) for row, text in enumerate(prompts or texts) for line in text.split("\n")]
            known = np.flatnonzero(self._has_known([line for _, line in lines])).tolist()
            hits[[lines[at][0] for at in known]] = True
        return list(hits.tolist())

    def _has_known(self, words: Sequence[bytes]) -> NDArray[np.bool_]:
        """Return bool [texts]: whether one of the text's runs of words is in the index."""
        has_known = np.zeros(len(words), np.bool_)
        if not len(self._known):
            return has_known
        grams, begin = runs(*word_hashes(words), self._ngram)
        places = np.minimum(np.searchsorted(self._known, grams), len(self._known) - 1)
        hits = np.flatnonzero(self._known[places] == grams)
        has_known[np.searchsorted(begin, hits, side="right") - 1] = True
        return has_known


def _words(text: str) -> bytes:
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS)
    return _NO_WORD.sub(" ", text.lower()).encode("utf-8", "surrogatepass")
