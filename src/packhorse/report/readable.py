"""Text of rows, made fit to be looked at: nothing hidden, nothing that steers a terminal, nothing endless."""

from __future__ import annotations

import re
from typing import Final

# Shown by number: control characters but tab and newline (an escape would steer a terminal), marks that turn the
# direction of all that follows, separators that look like nothing, and halves of characters, which no file can hold.
_HIDDEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def readable(text: str) -> str:
    """Return the text with each character that cannot be seen as its number, such as `‹U+202E›`."""
    return _HIDDEN.sub(lambda found: f"‹U+{ord(found[0]):04X}›", text)


def clipped(text: str, most_characters: int) -> str:
    """Return the text, or its first three quarters and last quarter with the number of characters left out between."""
    out = len(text) - most_characters
    if out <= 0:
        return text
    last = most_characters // 4
    return f"{text[: most_characters - last]} ‹… {out:,} characters …› {text[len(text) - last :]}"
