"""`packhorse report RUN`: one page about a run, in its folder."""

from __future__ import annotations

from packhorse.cli.show.text import open_console, print_plain
from packhorse.errors import EXIT_OK
from packhorse.run_folder.folder import open_run, relative
from packhorse.workflows.report import report_run


def report(run: str) -> int:
    """Write RUN/report.html and RUN/report.json, and print the verdict.

    Raises:
        UserError: There is no such run, or its folder cannot be written.
    """
    page, sentence = report_run(open_run(run))
    console = open_console()
    print_plain(sentence, console)
    print_plain(f"saved as {relative(page)}; open it in a browser", console)
    return EXIT_OK
