"""Make the text of rows safe to show: no hidden characters, no terminal control, limited length."""

from __future__ import annotations

import re
from typing import Final

# Shown by number: control characters except tab and newline (an escape would control a terminal), marks that change the
# direction of the text after them, invisible separators, and half surrogates, which no file can hold.
_HIDDEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def readable(text: str) -> str:
    """Return the text with each invisible character replaced by its number, such as `‹U+202E›`."""
    return _HIDDEN.sub(lambda found: f"‹U+{ord(found[0]):04X}›", text)


def clipped(text: str, most_characters: int) -> str:
    """Return the text, or its first three quarters and last quarter with the number of omitted characters between."""
    num_omitted = len(text) - most_characters
    if num_omitted <= 0:
        return text
    last = most_characters // 4
    return f"{text[: most_characters - last]} ‹… {num_omitted:,} characters …› {text[len(text) - last :]}"
