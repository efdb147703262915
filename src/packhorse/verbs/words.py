"""What every verb of the command line is made of: an `Action`, and how its words are read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from packhorse.errors import UserError


@dataclass(frozen=True)
class Action:
    """What the user asked for: a function of `packhorse.commands`, and its arguments."""

    module: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


def overrides_of(positional: Sequence[str], more: dict[str, str], flags: Sequence[str] = ()) -> list[str]:
    """What a user set on the command line, words and flags alike.

    Raises:
        UserError: A flag is nearly one that the verb knows.
    """
    for name in more:
        close = difflib.get_close_matches(name, flags, n=1, cutoff=0.7)
        if close:
            raise UserError(
                f"--{name} is neither a flag nor a field of the recipe.",
                "a word that nobody reads would change nothing, silently.",
                f"did you mean --{close[0]}?",
            )
    return [*positional, *(f"{name}={value}" for name, value in more.items())]


def count_of(name: str, text: str, at_least: int = 1) -> int | None:
    """A whole number of at least so many; None where nothing was given.

    Raises:
        UserError: It is none.
    """
    if not text:
        return None
    if not text.isdecimal() or int(text) < at_least:
        raise UserError(
            f"--{name} is {text}.",
            "it is a count.",
            f"give a whole number of {at_least} or more, for example --{name} 8.",
        )
    return int(text)


def amount_of(name: str, text: str) -> float | None:
    """A number above 0; None where nothing was given.

    Raises:
        UserError: It is none.
    """
    if not text:
        return None
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if not 0 < amount < math.inf:
        raise UserError(
            f"--{name} is {text}.",
            "time and price are multiples of it.",
            f"give a number above 0, for example --{name} {'2.50' if name == 'price' else '400'}.",
        )
    return amount


def switch_of(name: str, text: str) -> bool:
    """Whether a switch was given.

    Raises:
        UserError: It was given a value.
    """
    if text not in ("True", "False"):
        raise UserError(f"--{name} is {text}.", "it is a switch and takes no value.", f"write --{name} alone.")
    return text == "True"
