"""Templates that write the date: detect them, and fix their clock to the date of the recipe.

`strftime_now(format)` is the only clock that transformers gives to a template.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import Final

from packhorse.data.formats.bad_row import BadRowError, excerpt

CLOCK: Final = "strftime_now"
# No directive of strftime has the same value at both times, apart from the time zone.
TIMES: Final = (datetime(1987, 2, 3, 4, 5, 6, 7), datetime(2024, 11, 30, 19, 58, 47, 8))
DIRECTIVE: Final = re.compile("%-?[a-zA-Z]")
PERCENT: Final = "<percent>"


class ClockError(BadRowError):
    """A template writes the date of the day on which it is rendered."""

    def __init__(self, text: str, at: int) -> None:
        """Describe a chat's text with the current date near the character `at`."""
        super().__init__(
            f"the chat template writes the current date ({CLOCK}): {excerpt(text, at)}",
            "each day gives the rows other tokens, and a served model would see another date than it learned.",
            f"set data.template_date to a fixed date, such as {date.today().isoformat()}; the published tokenizer "
            "writes it too.",
        )


class Clock:
    """`strftime_now` for templates, which notes whether it was read.

    Attributes:
        now: Time that it shows.
        was_read: Whether a template has called it.
    """

    def __init__(self) -> None:
        self.now = TIMES[0]
        self.was_read = False

    def __call__(self, format: str) -> str:  # noqa: A002 (the name that templates may give)
        """Return the time in a format of strftime."""
        self.was_read = True
        return self.now.strftime(format)


def with_fixed_clock(source: str, day: str) -> str:
    """Return a template in which `strftime_now` is a macro that gives the midnight at which a day begins.

    The macro is part of the template, so every server that renders it writes the same date.

    Args:
        source: Jinja text; one without the clock is returned unchanged.
        day: Date in ISO form.
    """
    if CLOCK not in source:
        return source
    midnight = datetime.fromisoformat(day)
    values = {directive: midnight.strftime(directive) for directive in sorted({*DIRECTIVE.findall(source)})}
    pairs = [("%%", PERCENT), *values.items(), (PERCENT, "%")]
    replaced = " | ".join(f"replace('{old}', '{new}')" for old, new in pairs)
    # The environment of chat templates removes the line break after a block, so the template's own text is unchanged.
    return f"{{%- macro {CLOCK}(format) -%}}{{{{- format | {replaced} -}}}}{{%- endmacro %}}\n{source}"
