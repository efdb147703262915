"""MinHash signatures over word shingles: the share of equal slots estimates the similarity of two texts.

The minima are rensa's (fast similarity sketching, Dahlgaard et al. 2017, arXiv 1704.04370), whose 64 slots have an
error of .043; 64 independent slots would have .056.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from packhorse.data.checks.words import Hashes, Offsets, character_hashes, runs, word_hashes

NUM_SLOTS: Final = 64
SHINGLE_WORDS: Final = 3
SEED: Final = 42
SPACED_BYTES: Final = 32
"""Bytes per word above which a text in a non-Latin script is treated as one without spaces."""


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Return uint32 [rows, 64], the MinHash signature of each text's set of 3-word shingles.

    Words are lower-cased and separated by white space; a text of fewer than three words is one shingle. Chinese,
    Japanese, Thai and other scripts without spaces between words are split into characters.
    """
    if not texts:
        return np.empty((0, NUM_SLOTS), np.uint32)
    encoded = [_lowered(text) for text in texts]
    hashes, offsets = word_hashes(encoded)
    out = _minima(*runs(hashes, offsets, SHINGLE_WORDS))
    unspaced = _unspaced(texts, encoded, np.diff(offsets))
    if unspaced:
        characters = character_hashes([texts[row] for row in unspaced])
        out[unspaced] = _minima(*runs(*characters, SHINGLE_WORDS))
    return out


def _lowered(text: str) -> bytes:
    # `word_hashes` lower-cases the whole batch as ASCII, many times faster than one text at a time.
    return text.encode() if text.isascii() else text.lower().encode("utf-8", "surrogatepass")


def _unspaced(texts: Sequence[str], encoded: Sequence[bytes], num_words: Offsets) -> list[int]:
    num_bytes = np.fromiter(map(len, encoded), np.int64, len(encoded))
    long_words = np.flatnonzero(num_bytes > SPACED_BYTES * num_words).tolist()
    # A character of these scripts has three bytes; long words of one-byte characters are addresses or data.
    return [row for row in long_words if len(encoded[row]) >= 2 * len(texts[row])]


def _minima(shingles: Hashes, offsets: Offsets) -> NDArray[np.uint32]:
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets.astype(np.uint64), NUM_SLOTS, SEED)
    # rensa returns its matrix only as lists of ints; array converts them twice as fast as numpy.
    joined = bytearray().join([array("I", row) for row in matrix.to_rows()])
    return np.frombuffer(joined, np.uint32).reshape(-1, NUM_SLOTS)
