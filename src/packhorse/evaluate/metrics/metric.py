"""What a metric is: one value per row, computed from the expected answer and the answer of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:  # scipy takes a second to import, and a stored result is read without it
    from packhorse.evaluate.statistics.paired import Kind

Unit = Literal["%", "points", "nats", "value"]
END_OF_THINKING: Final = "</think>"


@dataclass(frozen=True)
class Reply:
    """An answer to score.

    Attributes:
        text: Text without special tokens and without thinking.
        ended: Whether the model ended it with a stop token; otherwise it was cut at its limit.
    """

    text: str
    ended: bool


@dataclass(frozen=True)
class Expected:
    """The answer of the row.

    Attributes:
        text: Text without thinking; a tool call is written as the chat template writes it.
        has_tool_calls: Whether the answer calls tools.
        row: The row's prompt, tools and answer, for metrics of the user.
    """

    text: str
    has_tool_calls: bool = False
    row: Any = None


Scorer = Callable[[Expected, Reply], float]
"""Function that returns the value of one row; NaN if the metric does not apply to it."""


@dataclass(frozen=True)
class Metric:
    """A metric by row.

    Attributes:
        name: Name in tables, results and `evaluation.gate`.
        kind: `binary` for values 0 and 1, else `graded`; it decides the statistical test.
        unit: `%`: a share, shown times 100; `points`: 0 to 100; `nats`: a loss; `value`: any other number.
        score: Value of one row.
        higher_is_better: False for a loss.
    """

    name: str
    kind: Kind
    unit: Unit
    score: Scorer
    higher_is_better: bool = True


LOSS: Final = Metric("loss", "graded", "nats", lambda *_: math.nan, higher_is_better=False)
"""Loss by document, weighted by supervised tokens; it is measured, and not computed from an answer."""


def without_thinking(text: str) -> str:
    """Return the text after the thinking, which may differ between two right answers."""
    return text.rpartition(END_OF_THINKING)[2]
