"""What a user reads when something is wrong: one fact, why it matters, the smallest fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_LOST = 3  # a rank was killed or hung
EXIT_NOT_FINITE = 65  # EX_DATAERR: a loss or a gradient is no number
EXIT_MEMORY = 71  # EX_OSERR: out of device memory
EXIT_DISK = 74  # EX_IOERR: the disk is full or refuses
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, resume me


@dataclass(frozen=True)
class Mistake:
    """One thing that the user can mend.

    Attributes:
        fact: What is so, with both numbers, in the user's own field names.
        why: Why it cannot go on like this.
        fix: The smallest change that mends it.
        where: ``file:line`` where the mistake stands, empty if it stands in no file.
    """

    fact: str
    why: str
    fix: str
    where: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {self.fact}" if self.where else self.fact
        return f"{head}\n  why: {self.why}\n  fix: {self.fix}"


class UserError(Exception):
    """A user's mistake, or several found at once; the command line prints it and exits with `exit_code`, mostly 2."""

    def __init__(self, fact: str, why: str, fix: str, where: str = "", exit_code: int = EXIT_USER_ERROR) -> None:
        self.mistakes: tuple[Mistake, ...] = (Mistake(fact, why, fix, where),)
        self.exit_code = exit_code
        super().__init__(str(self))

    def __str__(self) -> str:
        return "\n".join(str(mistake) for mistake in self.mistakes)

    @classmethod
    def of(cls, mistakes: Iterable[Mistake]) -> UserError:
        """Joins mistakes found together into one error, so that all are mended in one go.

        Raises:
            ValueError: There are no mistakes.
        """
        found = tuple(mistakes)
        if not found:
            raise ValueError("a UserError needs at least one mistake")
        error = cls(found[0].fact, found[0].why, found[0].fix, found[0].where)
        error.mistakes = found
        error.args = (str(error),)
        return error
