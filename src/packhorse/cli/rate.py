"""`packhorse rate RUN`: people compare base and tuned answers without knowing which is which."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Callable
from typing import Final

from packhorse.cli.show.text import open_console, print_plain
from packhorse.errors import EXIT_OK, UserError
from packhorse.evaluate.ratings import CHOICES, BlindRow, RatingSession
from packhorse.evaluate.show import render
from packhorse.report.readable import readable
from packhorse.run_folder.folder import open_run, relative
from packhorse.workflows.rate import add_ratings, rating_session

KEYS: Final = {"1": "first", "2": "second", "t": "tie"}
HELP: Final = {
    "choice": "1, 2: this answer is better; t: tie",
    "scores": "two scores from 1 (useless) to 5 (perfect), first that of answer 1, such as 4 2",
}
OTHER: Final = "s: skip, b: back, r: reference answer, q: quit"


def rate(
    run: str, rater: str = "", scores: bool = False, web: bool = False, port: int | None = None, show: bool = False
) -> int:
    """Rate answers in the terminal or on a page, until all are rated or the user quits.

    Raises:
        UserError: The run is not evaluated, or all answers are equal.
    """
    plan = open_run(run)
    console = open_console()
    if show:
        console.print(render(add_ratings(plan)))
        return EXIT_OK
    session = rating_session(plan, rater or getpass.getuser(), "scores" if scores else "choice")
    try:
        if web:
            _serve(session, port or 0, lambda text: print_plain(text, console))
        else:
            rate_in_terminal(session, input, lambda text: print_plain(text, console))
    finally:
        if session.num_rated:
            add_ratings(plan)
    shown = relative(plan.run_folder)
    # No figures here: a rater who knows who is ahead is no longer blind.
    print_plain(f"{session.rater} has rated {session.num_rated} of {session.num_rows} rows", console)
    print_plain(f"results of all raters: packhorse rate {shown} --show", console)
    return EXIT_OK


def rate_in_terminal(session: RatingSession, read: Callable[[str], str], write: Callable[[str], None]) -> None:
    """Show rows and read ratings until all are rated or the user quits.

    Args:
        session: Ratings of one person.
        read: Function like `input`: shows a prompt, returns a line, raises EOFError at the end.
        write: Prints a text and a line end.
    """
    shown = session.next()
    while shown is not None:
        write(_row_text(session, shown))
        typed = ""
        while not typed:
            try:
                typed = read(f"{HELP[session.kind]}; {OTHER} > ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                write("")
                return
            if typed == "r":
                write(f"reference answer:\n{readable(shown.row.expected)}")
                typed = ""
            elif typed not in ("q", "b", "s") and not _rated(session, shown, typed):
                typed = ""
        if typed == "q":
            return
        if typed == "s":
            session.skip(shown)
        shown = (session.last() if typed == "b" else None) or session.next()


def _rated(session: RatingSession, shown: BlindRow, typed: str) -> bool:
    """Keep the rating that was typed; return False if it is none."""
    if session.kind == "choice":
        if typed not in KEYS:
            return False
        session.rate(shown, *CHOICES[KEYS[typed]])
        return True
    values = typed.split()
    if len(values) != 2 or not set(values) <= {"1", "2", "3", "4", "5"}:
        return False
    session.rate(shown, float(values[0]), float(values[1]))
    return True


def _row_text(session: RatingSession, shown: BlindRow) -> str:
    first, second = shown.answers
    parts = [*shown.row.turns, ("answer 1", first), ("answer 2", second)]
    texts = [f"--- {title} ---\n{readable(text) or '(empty)'}" for title, text in parts]
    return "\n\n".join([f"\n{session.num_rated} of {session.num_rows} rated", *texts]) + "\n"


def _serve(session: RatingSession, port: int, write: Callable[[str], None]) -> None:
    # Only here: ratings in the terminal need no page.
    from packhorse.report.rating_page import RatingServer

    try:
        server = RatingServer(session, port)
    except OSError as error:
        raise UserError(
            f"port {port} of this machine cannot be opened: {error.strerror}.",
            "the page is served there, to this machine only.",
            "choose another port, or remove --port for a free one.",
        ) from error
    write(f"open {server.url} in a browser on this machine; Ctrl-C ends it")
    sys.stdout.flush()
    with server:
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            write("")
