"""The doctor's part in a job script, which puts srun, and a container, between its two halves.

question=$(python -m packhorse.doctor ask RUN) || exit
srun --label python -m packhorse.doctor.node "$question" 2>&1 | python -m packhorse.doctor judge "$question" || exit

`ask` prints the question for the run's nodes; `judge` reads what srun carries back; 1 where a row is broken.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress

from rich.console import Console

from packhorse.doctor.examination import last_words
from packhorse.doctor.facts import Question
from packhorse.doctor.folder import meeting_place, open_place
from packhorse.doctor.judge import judge
from packhorse.doctor.node import MARK, from_lines
from packhorse.doctor.question import question_of_run
from packhorse.doctor.rows import EXIT_BROKEN
from packhorse.doctor.table import summary
from packhorse.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from packhorse.run_folder.folder import open_run

USAGE = "usage: python -m packhorse.doctor ask RUN [SCRATCH] | judge QUESTION\n"


def main(words: list[str]) -> int:
    """Runs one half; exit code 2 for a mistake, 1 where a row is broken."""
    if len(words) < 2 or words[0] not in ("ask", "judge"):
        sys.stderr.write(USAGE)
        return EXIT_USER_ERROR
    try:
        return ask(*words[1:]) if words[0] == "ask" else tell(words[1])
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def ask(run: str, scratch: str = "") -> int:
    """Prints the question for a run's nodes, fast rows only."""
    question = question_of_run(open_run(run), scratch, fast=True)
    with suppress(OSError):  # what the nodes will say
        open_place(question)
    sys.stdout.write(question.model_dump_json() + "\n")
    return EXIT_OK


def tell(text: str) -> int:
    """Judges what stands on standard input; says one line where all is well, and the table where it is not."""
    question = Question.model_validate_json(text)
    lines = sys.stdin.read().splitlines()
    shutil.rmtree(meeting_place(question), ignore_errors=True)
    said = "\n".join(line for line in lines if MARK not in line)
    rows = judge(question, from_lines(lines), last_words(said))
    return EXIT_BROKEN if summary(Console(stderr=True), rows, all_rows=False) else EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
