"""Text that was decoded with the wrong code on its way: found cheaply, mended by ftfy where it can be undone."""

from __future__ import annotations

import re
from typing import Final

from ftfy import fix_encoding
from ftfy.badness import is_bad

BYTE_ORDER_MARK: Final = "\ufeff"

# Control characters but tab and line ends, the byte order mark, and what decoders write for bytes that mean nothing.
_NEVER_MEANT: Final = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffd]")


def broken_encoding(text: str) -> bool:
    """Say whether text holds mojibake that can be undone, U+FFFD, a byte order mark or a control character."""
    return first_damage(text) is not None


def first_damage(text: str) -> int | None:
    """Return where the first of these stands; None in sound text."""
    if text.isascii() and text.isprintable():
        return None
    never_meant = _NEVER_MEANT.search(text)
    if never_meant is not None:
        return never_meant.start()
    mended = _unmixed(text)
    if mended == text:
        return None
    differing = (at for at, (one, other) in enumerate(zip(text, mended)) if one != other)
    return next(differing, min(len(text), len(mended)) - 1)


def mend(text: str) -> str:
    """Undo wrong decoding, such as `Ã³` for `ó` and `â€™` for `’`, and take byte order marks out; change nothing else.

    U+FFFD and control characters stay: what stood there is lost.
    """
    return text if text.isascii() else _unmixed(text.replace(BYTE_ORDER_MARK, ""))


def _unmixed(text: str) -> str:
    if text.isascii() or not is_bad(text):
        return text
    # Line by line: a sound line, which no code turns into a sound one, would keep the others from being mended.
    return "\n".join([fix_encoding(line) for line in text.split("\n")])
