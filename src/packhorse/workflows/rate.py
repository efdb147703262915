"""Blind ratings of a run's answers by people, and their results in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from packhorse.errors import UserError
from packhorse.evaluate.ratings import Kind, RatingSession, with_ratings
from packhorse.evaluate.results import Comparison
from packhorse.evaluate.stored import require_writable
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.folder import relative
from packhorse.workflows.evaluate import ratings_file, read_evaluation, write_evaluation

LONGEST_NAME: Final = 100


def rating_session(plan: RunPlan, rater: str, kind: Kind) -> RatingSession:
    """Return the ratings of one person, to be continued.

    Args:
        plan: Plan of an evaluated run.
        rater: Name of the person.
        kind: `choice` or `scores`.

    Raises:
        UserError: There is no evaluation, no row has two different answers, the name cannot be shown, or the ratings
            cannot be written.
    """
    if not rater.strip() or not rater.isprintable() or len(rater) > LONGEST_NAME:
        raise UserError(
            f"--rater is {rater[:LONGEST_NAME]!r}.",
            f"the ratings of each person are kept under a printable name of 1 to {LONGEST_NAME} characters.",
            "write for example --rater ana.",
        )
    folder = Path(plan.run_folder)
    session = RatingSession(read_evaluation(folder).rows(), ratings_file(folder), rater, kind)
    if not session.num_rows:
        raise UserError(
            f"base and tuned model of {relative(folder)} give the same answer to every row.",
            "people compare two different answers.",
            f"look at the answers in {relative(folder)}/evaluation/rows.parquet; training may have changed nothing.",
        )
    require_writable(ratings_file(folder))
    return session


def add_ratings(plan: RunPlan) -> Comparison:
    """Return the stored evaluation of a run with all ratings so far; also write it.

    Raises:
        UserError: There is no evaluation, or there are no ratings.
    """
    folder = Path(plan.run_folder)
    stored = with_ratings(read_evaluation(folder), ratings_file(folder), plan.recipe.evaluation)
    if not stored.comparison.people:
        raise UserError(
            f"{relative(folder)} has no ratings of its present answers.",
            "people rate the answers of an evaluation; ratings of other answers do not count.",
            f"rate some: packhorse rate {relative(folder)}",
        )
    write_evaluation(stored, folder)
    return stored.comparison
