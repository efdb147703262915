"""What ends an attempt so that the launcher starts another one by itself."""

from __future__ import annotations

from typing import Literal

from packhorse.errors import UserError

Again = Literal["rewind", "shrink"]


class AnotherAttempt(UserError):  # noqa: N818  (a request, no error)
    """Ends every rank; RUN/logs/attempt-N/rank-R.json says `again` to the launcher, which goes on as it says.

    rewind: from the newest checkpoint that stands, the steps of RUN/skipped_steps.json left out.
    shrink: the same with smaller micro-batches.
    """

    def __init__(self, again: Again, fact: str, why: str, fix: str, exit_code: int) -> None:
        self.again: Again = again
        super().__init__(fact, why, fix, exit_code=exit_code)
