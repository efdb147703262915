"""Opinions of a judge and of people on the answers of an evaluation, and their summaries in words. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from packhorse.evaluate.metrics.metric import Metric

JUDGE_WINS: Final = Metric("judge_wins", "binary", "%", lambda *_: math.nan)
"""Share of rows on which the judge prefers the model's answer, in both orders."""
JUDGE_SCORE: Final = Metric("judge_score", "graded", "value", lambda *_: math.nan)
PEOPLE_WINS: Final = Metric("people_wins", "graded", "%", lambda *_: math.nan)
"""Share of rows on which people prefer the model's answer; of a row that several people rated, their mean."""
PEOPLE_SCORE: Final = Metric("people_score", "graded", "value", lambda *_: math.nan)
OPINION_METRICS: Final = (JUDGE_WINS, JUDGE_SCORE, PEOPLE_WINS, PEOPLE_SCORE)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class JudgeResult(_Frozen):
    """What a judge said about the answers."""

    model: str
    mode: Literal["pairwise", "rubric"]
    num_rows: int
    """Rows that were judged."""
    num_identical: int
    """Rows with two equal answers; pairwise they are ties without a request."""
    num_unparsed: int
    """Rows without a value: a reply has no verdict in the requested form."""
    wins: int = 0
    """Rows on which the tuned model is preferred in both orders; under rubric, has the higher score."""
    losses: int = 0
    ties: int = 0
    """Equal answers, ties in both orders, and rows on which the two orders disagree."""
    num_both: int = 0
    """Rows with a verdict in both orders."""
    num_agreed: int = 0
    """Rows on which both orders give the same verdict."""
    num_named: int = 0
    """Verdicts that name one of the two answers."""
    num_first: int = 0
    """Verdicts that name the answer that was shown first."""
    position_p: float | None = None
    """Two-sided p of the binomial test that both positions are named equally often."""
    num_replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    """Cost of all replies by the prices of the recipe; None without prices."""
    shared_family: str = ""
    """Word that the names of the judge and of the base model share, such as `qwen`."""


class RaterResult(_Frozen):
    """Ratings of one person."""

    rater: str
    num_rated: int
    num_first: int
    """Preferences for the answer that was shown first."""
    num_named: int
    """Preferences that are no tie."""


class PeopleResult(_Frozen):
    """Ratings of people by one kind of question."""

    kind: Literal["choice", "scores"]
    """`choice`: the better of two answers, or a tie; `scores`: each answer 1 to 5."""
    raters: tuple[RaterResult, ...]
    num_rows: int
    """Rows that somebody rated."""
    num_shared: int
    """Rows that two raters or more rated."""
    num_outdated: int
    """Ratings of other answers than the evaluation now has; they are not counted."""
    alpha: float | None
    """Krippendorff's alpha of the raters: nominal for choices, ordinal for scores; None if it is not defined."""


def judge_notes(result: JudgeResult) -> Iterator[str]:
    """Yield what a reader of the judge's figures must know, in sentences."""
    counts = f"tuned better on {result.wins:,}, base on {result.losses:,}, tie on {result.ties:,}"
    equal = f" ({result.num_identical:,} with equal answers)" if result.num_identical else ""
    yield f"judge {result.model}, {result.mode}: {counts} of {result.num_rows:,} rows{equal}."
    if result.num_unparsed:
        yield f"{result.num_unparsed:,} rows have no verdict: a reply lacks it, and is not scored."
    if result.num_both:
        yield (
            f"both orders of the answers gave the same verdict on {result.num_agreed:,} of {result.num_both:,} rows; "
            "the others are ties."
        )
    if result.num_named:
        share = 100 * result.num_first / result.num_named
        bias = f"{share:.0f} % of {result.num_named:,} verdicts named the answer shown first"
        if result.position_p is not None and result.position_p < 0.05:
            bias += f": a position bias (p = {result.position_p:.2g}), which both orders cancel"
        yield f"{bias}."
    if result.shared_family:
        yield (
            f"judge and base model are both of the {result.shared_family} family: a judge tends to prefer answers of "
            "models like it."
        )
    cost = f", cost {result.cost:.4g}" if result.cost is not None else ""
    yield (
        f"{result.num_replies:,} replies: {result.prompt_tokens:,} tokens read, {result.completion_tokens:,} "
        f"written{cost}."
    )


def people_notes(result: PeopleResult) -> Iterator[str]:
    """Yield what a reader of people's ratings must know, in sentences."""
    raters = ", ".join(f"{rater.rater} {rater.num_rated:,}" for rater in result.raters)
    what = "choices" if result.kind == "choice" else "scores"
    yield f"people, {what}: {result.num_rows:,} rows (by rater: {raters})."
    named, first = (sum(getattr(rater, name) for rater in result.raters) for name in ("num_named", "num_first"))
    if named:
        yield f"{100 * first / named:.0f} % of {named:,} preferences were for the answer shown first."
    if len(result.raters) > 1:
        if not result.num_shared:
            yield "no row was rated by two raters, so their agreement is not known; all raters see one order of rows."
        elif result.alpha is None:
            yield f"all ratings of {result.num_shared:,} shared rows are equal: Krippendorff's alpha is not defined."
        else:
            level = "nominal" if result.kind == "choice" else "ordinal"
            low = "; below 0.67 the raters do not agree enough for a conclusion" if result.alpha < 0.67 else ""
            yield (f"Krippendorff's alpha ({level}) is {result.alpha:.2f} on {result.num_shared:,} shared rows{low}.")
    if result.num_outdated:
        yield f"{result.num_outdated:,} ratings are of other answers than the evaluation now has, and are not counted."
