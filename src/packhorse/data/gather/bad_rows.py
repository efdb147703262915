"""The file that lists the bad rows of all sources: a message shows three rows of a kind."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from packhorse.data.read.row import RowMistakes
from packhorse.data.resolve import source_name
from packhorse.durable import replace_file
from packhorse.errors import Mistake, UserError
from packhorse.recipe.schema import Source

MISTAKES_FILE: Final = "mistakes.jsonl"


class BadRowList:
    """Bad rows of all sources, and the file that lists them: it is that of the newest look at the rows, or absent."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._sources: list[RowMistakes] = []

    def of(self, source: Source) -> RowMistakes:
        """Return the mistakes of a source, without any yet."""
        self._sources.append(RowMistakes(source_name(source), self._file))
        return self._sources[-1]

    def write(self, mistakes: Sequence[Mistake]) -> None:
        """Write the file if bad rows were dropped or not all are shown, remove an earlier one, and raise the mistakes.

        Args:
            mistakes: Mistakes that stop the command.

        Raises:
            UserError: There are such mistakes, or the file cannot be written.
        """
        wanted = any(not source.all_shown or (source.recorded and not mistakes) for source in self._sources)
        try:
            if wanted:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                replace_file(self._file, self._lines(), writer=f".draft-{os.getpid()}")
            elif self._file.exists():
                self._file.unlink()
        except OSError as error:
            mistakes = [*mistakes, self._unwritable(error)]
        if mistakes:
            raise UserError.of(mistakes)

    def _lines(self) -> str:
        rows = (
            {"where": mistake.where, "fact": mistake.fact, "why": mistake.why, "fix": mistake.fix}
            for source in self._sources
            for mistake in source.recorded
        )
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _unwritable(self, error: OSError) -> Mistake:
        return Mistake(
            f"{self._file} cannot be written: {error.strerror}.",
            "it lists every bad row.",
            f"free space there, or make the folder writable: chmod u+w {self._file.parent}",
        )
