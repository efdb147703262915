"""Hash the words of a batch of texts as 64-bit numbers, and compute MinHash signatures over runs of words.

As Python strings, shingles would cost more than all that is done with them; here a batch is one buffer of bytes. The
minima are rensa's (fast similarity sketching, Dahlgaard et al. 2017, arXiv 1704.04370), whose 64 slots have an error of
.043; 64 independent slots would have .056.

Shapes: B rows, W words of the batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]

LONGEST_WORD: Final = 64
"""Bytes of a word that count; of a longer word, the first bytes and its length."""

# Odd constants of xxHash64 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md), which spread well in multiplication.
_PRIMES: Final = (np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))
_FIRST_BYTES: Final = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)


def word_hashes(encoded: Sequence[bytes]) -> tuple[Hashes, Offsets]:
    """Hash the words of each row; words are separated by ASCII white space or control characters, in ASCII lower case.

    Returns:
        uint64 [W], and int64 [B + 1], position of each row's first word.
    """
    # A line break before and after lets every word end inside the buffer; the zeros allow 8-byte reads at the end.
    joined = b"\n".join([b"", *encoded, b""]).lower() + bytes(8)
    is_space = np.frombuffer(joined, np.uint8, len(joined) - 8) <= 32
    edges = np.flatnonzero(is_space[1:] != is_space[:-1])
    starts = edges[0::2] + 1
    lengths = edges[1::2] + 1 - starts
    row_starts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)) + 1, out=row_starts[1:])
    eights = np.ndarray((len(joined) - 7,), "<u8", joined, strides=(1,))
    return _hashed(eights, starts, lengths), np.searchsorted(starts, row_starts)


def character_hashes(texts: Sequence[str]) -> tuple[Hashes, Offsets]:
    """Hash each character as one word, without white space; shapes as in `word_hashes`."""
    bare = ["".join(text.lower().split()) for text in texts]
    points = np.frombuffer("".join(bare).encode("utf-32-le", "surrogatepass"), "<u4")
    offsets = np.zeros(len(bare) + 1, np.int64)
    np.cumsum([len(text) for text in bare], out=offsets[1:])
    return mixed((points.astype(np.uint64) + np.uint64(1)) * _PRIMES[0]), offsets


def runs(hashes: Hashes, offsets: Offsets, num_words: int) -> tuple[Hashes, Offsets]:
    """Hash each run of `num_words` words; a row of fewer words is one run, a row without words has none.

    Returns:
        uint64 [runs], and int64 [B + 1], position of each row's first run.
    """
    row_words = np.diff(offsets)
    out, after = mixed(hashes), hashes.copy()
    is_whole = np.ones(len(hashes), np.bool_)
    last = offsets[1:][row_words > 0] - 1
    for step in range(1, num_words):
        # Beyond the end of a row, words count as 0, so that a short row differs from the beginning of a longer one.
        after[:-1] = after[1:]
        after[last] = 0
        out *= _PRIMES[1]
        out += after
        is_whole[offsets[1:][row_words > step] - step] = False
    kept = np.zeros(len(offsets), np.int64)
    np.cumsum(np.minimum(row_words, np.maximum(row_words - num_words + 1, 1)), out=kept[1:])
    return mixed(out[is_whole] * _PRIMES[2]), kept


def mixed(hashes: Hashes) -> Hashes:
    """Mix the high bits, which multiplication spreads best, into the low ones."""
    return hashes ^ (hashes >> np.uint64(31))


def _hashed(eights: Hashes, starts: Offsets, lengths: Offsets) -> Hashes:
    """Hash the bytes of each word, eight at a time; `eights` holds the 8-byte number at each byte of the buffer."""
    hashes = eights[starts]
    hashes &= _FIRST_BYTES[np.minimum(lengths, 8)]
    hashes *= _PRIMES[0]
    done, longer = 8, np.flatnonzero(lengths > 8)
    while len(longer) and done < LONGEST_WORD:
        rest = eights[starts[longer] + done] & _FIRST_BYTES[np.minimum(lengths[longer] - done, 8)]
        hashes[longer] = (mixed(hashes[longer]) + rest) * _PRIMES[1]
        done += 8
        longer = longer[lengths[longer] > done]
    hashes[longer] += lengths[longer].astype(np.uint64) * _PRIMES[2]
    return mixed(hashes)


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
