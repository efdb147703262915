"""Detect text that was decoded with the wrong encoding, and fix it with ftfy where that is possible."""

from __future__ import annotations

import re
from typing import Final

from ftfy import fix_encoding
from ftfy.badness import is_bad

BYTE_ORDER_MARK: Final = "\ufeff"

# Control characters except tab and line ends, the byte order mark, and the replacement character.
_NEVER_MEANT: Final = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffd]")


def broken_encoding(text: str) -> bool:
    """Return whether text has mojibake that can be fixed, U+FFFD, a byte order mark or a control character."""
    return first_damage(text) is not None


def first_damage(text: str) -> int | None:
    """Return the position of the first such character; None in sound text."""
    if text.isascii() and text.isprintable():
        return None
    never_meant = _NEVER_MEANT.search(text)
    if never_meant is not None:
        return never_meant.start()
    fixed = _fixed(text)
    if fixed == text:
        return None
    differing = (at for at, (one, other) in enumerate(zip(text, fixed)) if one != other)
    return next(differing, min(len(text), len(fixed)) - 1)


def fix_encoding_errors(text: str) -> str:
    """Fix wrong decoding, such as `Ã³` for `ó` and `â€™` for `’`, and remove byte order marks; change nothing else.

    U+FFFD and control characters stay, as the original character is unknown.
    """
    return text if text.isascii() else _fixed(text.replace(BYTE_ORDER_MARK, ""))


def _fixed(text: str) -> str:
    if text.isascii() or not is_bad(text):
        return text
    # Line by line: a sound line that no encoding explains would keep ftfy from fixing the others.
    return "\n".join([fix_encoding(line) for line in text.split("\n")])
