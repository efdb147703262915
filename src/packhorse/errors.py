"""Errors that a user can fix: a fact, why it matters, the smallest fix. Exit codes of all commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_LOST = 3  # a rank was killed or hung
EXIT_NO_GO = 3  # of `packhorse evaluate`: the gate is not met
EXIT_NOT_FINITE = 65  # EX_DATAERR of sysexits.h: a loss or a gradient is NaN or Inf
EXIT_MEMORY = 71  # EX_OSERR: out of device memory
EXIT_DISK = 74  # EX_IOERR: the disk is full or refuses
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, can be resumed
WHOLE_CHARACTERS: Final = 2_000
"""Characters of a value in a log: a row may have megabytes, and a message has several rows."""


def shown_characters(on_terminal: int) -> int:
    """Return how many characters of a value a message shows: more where it goes to a pipe or a file."""
    return on_terminal if sys.stderr.isatty() else max(on_terminal, WHOLE_CHARACTERS)


@dataclass(frozen=True)
class Mistake:
    """One mistake that the user can fix.

    Attributes:
        fact: What is wrong, with both values, in the user's own field names.
        why: Why it matters.
        fix: The smallest change that fixes it.
        where: ``file:line`` of the mistake; empty if it is in no file.
        kind: Mistakes of one kind may differ in values, and are shown as one; empty: as the reason and the fix say.
    """

    fact: str
    why: str
    fix: str
    where: str = ""
    kind: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {self.fact}" if self.where else self.fact
        return f"{head}\n  why: {self.why}\n  fix: {self.fix}"


class UserError(Exception):
    """One or several mistakes of the user; the command line prints them and exits with `exit_code`, 2 by default."""

    def __init__(self, fact: str, why: str, fix: str, where: str = "", exit_code: int = EXIT_USER_ERROR) -> None:
        self.mistakes: tuple[Mistake, ...] = (Mistake(fact, why, fix, where),)
        self.exit_code = exit_code
        super().__init__(str(self))

    def __str__(self) -> str:
        return "\n".join(str(mistake) for mistake in self.mistakes)

    @classmethod
    def of(cls, mistakes: Iterable[Mistake]) -> UserError:
        """Join several mistakes into one error, so that the user can fix all of them at once.

        Raises:
            ValueError: There are no mistakes.
        """
        joined = tuple(mistakes)
        if not joined:
            raise ValueError("a UserError needs at least one mistake")
        error = cls(joined[0].fact, joined[0].why, joined[0].fix, joined[0].where)
        error.mistakes = joined
        error.args = (str(error),)
        return error
