"""From the replies of a judge to values by row: a win counts only if both orders of the answers agree on it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from scipy.stats import binomtest

from packhorse.evaluate.judge.ask import Judge, JudgeReply
from packhorse.evaluate.judge.prompts import JudgePrompt, Side, read_score, read_verdict
from packhorse.evaluate.metrics.metric import Metric
from packhorse.evaluate.opinions import JUDGE_SCORE, JUDGE_WINS, JudgeResult
from packhorse.evaluate.stored import AnsweredRow
from packhorse.recipe.evaluation import JudgeSection

GENERIC: Final = {
    *("awq", "base", "chat", "distill", "flash", "for", "gguf", "gptq", "instruct", "large", "latest", "medium"),
    *("micro", "mini", "model", "models", "nano", "preview", "pro", "small", "tiny", "turbo"),
}
"""Words of model names that name no family."""


@dataclass(frozen=True)
class JudgePrompts:
    """Prompts of one row: pairwise in both orders, first A the base; under rubric of the base and the tuned answer."""

    row: AnsweredRow
    texts: tuple[str, ...]


def prompts_of(rows: Sequence[AnsweredRow], settings: JudgeSection) -> list[JudgePrompts]:
    """Return the prompts of the rows that are judged; pairwise equal answers have none.

    Args:
        rows: Answered rows, ordered by a hash of their content.
        settings: Section of the recipe.

    Raises:
        UserError: The template fails.
    """
    prompt = JudgePrompt(settings)
    sets = dict.fromkeys(row.set for row in rows)
    chosen = [row for name in sets for row in [row for row in rows if row.set == name][: settings.max_rows]]

    def texts(row: AnsweredRow) -> tuple[str, ...]:
        conversation = row.conversation
        if settings.mode == "rubric":
            return tuple(prompt.text(conversation, row.expected, answer=answer) for answer in (row.base, row.tuned))
        if row.base == row.tuned:
            return ()
        orders = ((row.base, row.tuned), (row.tuned, row.base))
        return tuple(prompt.text(conversation, row.expected, answer_a=a, answer_b=b) for a, b in orders)

    return [JudgePrompts(row, texts(row)) for row in chosen]


def judged(
    prompts: Sequence[JudgePrompts], judge: Judge, settings: JudgeSection, related_to: Iterable[str]
) -> tuple[Metric, dict[int, tuple[float, float]], JudgeResult]:
    """Return the metric, its values by line of the table, and a summary; each prompt has its reply.

    Args:
        prompts: Prompts of all rows.
        judge: The judge, after `ask`.
        settings: Section of the recipe.
        related_to: Names of the base model and its kind.
    """
    replies = {text: judge.reply(text) for each in prompts for text in each.texts}
    kept = list({reply.key: reply for reply in replies.values()}.values())
    head = JudgeResult(
        model=settings.model,
        mode=settings.mode,
        num_rows=len(prompts),
        num_identical=sum(each.row.base == each.row.tuned for each in prompts),
        num_unparsed=0,
        num_replies=len(kept),
        prompt_tokens=sum(reply.prompt_tokens for reply in kept),
        completion_tokens=sum(reply.completion_tokens for reply in kept),
        cost=judge.price(kept),
        shared_family=shared_family(settings.model, related_to),
    )
    decide = _pairwise if settings.mode == "pairwise" else _rubric
    values, counts = decide(prompts, replies.__getitem__)
    counts |= {
        "wins": sum(tuned > base for base, tuned in values.values()),
        "losses": sum(tuned < base for base, tuned in values.values()),
        "ties": sum(tuned == base for base, tuned in values.values()),
        "num_unparsed": sum(math.isnan(base) or math.isnan(tuned) for base, tuned in values.values()),
    }
    metric = JUDGE_WINS if settings.mode == "pairwise" else JUDGE_SCORE
    return metric, values, head.model_copy(update=counts)


def _pairwise(
    prompts: Sequence[JudgePrompts], reply: Callable[[str], JudgeReply]
) -> tuple[dict[int, tuple[float, float]], dict[str, float]]:
    """Return (base preferred, tuned preferred) by line, 0 or 1, and what the two orders show about the judge."""
    values = {}
    counts: dict[str, float] = {"num_both": 0, "num_agreed": 0, "num_named": 0, "num_first": 0}
    for each in prompts:
        if not each.texts:
            values[each.row.line] = (0.0, 0.0)
            continue
        first, second = (read_verdict(reply(text).text) for text in each.texts)
        counts["num_named"] += sum(side in ("A", "B") for side in (first, second))
        counts["num_first"] += [first, second].count("A")
        values[each.row.line] = _both_orders(first, second)
        if first is not None and second is not None:
            counts["num_both"] += 1
            counts["num_agreed"] += first == _swapped(second)
    named = int(counts["num_named"])
    p = {"position_p": float(binomtest(int(counts["num_first"]), named).pvalue)} if named else {}
    return values, counts | p


def _both_orders(first: Side | None, second: Side | None) -> tuple[float, float]:
    """Return (base preferred, tuned preferred); A of the first order is the base, A of the second the tuned model."""
    if first is None or second is None:
        return math.nan, math.nan
    if first != _swapped(second):  # the orders disagree
        return 0.0, 0.0
    return float(first == "A"), float(first == "B")


def _swapped(side: Side) -> Side:
    return {"A": "B", "B": "A", "tie": "tie"}[side]  # type: ignore[return-value]


def _rubric(
    prompts: Sequence[JudgePrompts], reply: Callable[[str], JudgeReply]
) -> tuple[dict[int, tuple[float, float]], dict[str, float]]:
    """Return the scores of base and tuned answer by line, 1 to 5; NaN without a score."""
    scores = {each.row.line: [read_score(reply(text).text) for text in each.texts] for each in prompts}
    return {line: (base, tuned) for line, (base, tuned) in scores.items()}, {}


def shared_family(judge: str, related_to: Iterable[str]) -> str:
    """Return a word that the name of the judge shares with another model's, such as `qwen`; empty if none."""
    found = _words(judge) & {word for name in related_to for word in _words(name)}
    return min(found, default="")


def _words(name: str) -> set[str]:
    """Return the words of three letters or more in the last part of a model's name, without those of all families."""
    words = set(re.findall(r"[a-z]{3,}", name.rstrip("/").rpartition("/")[2].lower()))
    return words - GENERIC
