"""The doctor in a job script, which runs srun, and a container, between its two commands.

request=$(python -m packhorse.doctor request RUN) || exit
srun --label python -m packhorse.doctor.node "$request" 2>&1 | python -m packhorse.doctor diagnose "$request" || exit

`request` prints what every node of the run checks; `diagnose` reads the answers from srun, and exits with 1 if a row is
broken.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress

from rich.console import Console

from packhorse.doctor.diagnosis import diagnose
from packhorse.doctor.facts import DoctorRequest
from packhorse.doctor.node import MARK, from_lines
from packhorse.doctor.request import request_for_run
from packhorse.doctor.run_checks import last_lines
from packhorse.doctor.shared_folder import check_folder_of, create_check_folder
from packhorse.doctor.table import EXIT_BROKEN, print_table
from packhorse.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from packhorse.run_folder.folder import open_run

USAGE = "usage: python -m packhorse.doctor request RUN [SCRATCH] | diagnose REQUEST\n"


def main(words: list[str]) -> int:
    """Run one of the two commands; exit code 2 for a user error, 1 if a row is broken."""
    if len(words) < 2 or words[0] not in ("request", "diagnose"):
        sys.stderr.write(USAGE)
        return EXIT_USER_ERROR
    try:
        return print_request(*words[1:]) if words[0] == "request" else diagnose_answers(words[1])
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def print_request(run: str, scratch: str = "") -> int:
    """Print the request for a run's nodes, with fast checks only."""
    request = request_for_run(open_run(run), scratch, fast=True)
    with suppress(OSError):  # the nodes report that they cannot write there
        create_check_folder(request)
    sys.stdout.write(request.model_dump_json() + "\n")
    return EXIT_OK


def diagnose_answers(text: str) -> int:
    """Diagnose the answers on standard input; print one line if all is well, else the table."""
    request = DoctorRequest.model_validate_json(text)
    lines = sys.stdin.read().splitlines()
    shutil.rmtree(check_folder_of(request), ignore_errors=True)
    other_output = "\n".join(line for line in lines if MARK not in line)
    rows = diagnose(request, from_lines(lines), last_lines(other_output))
    return EXIT_BROKEN if print_table(Console(stderr=True), rows, all_rows=False) else EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
