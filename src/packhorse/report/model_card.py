"""The README.md of an exported model, from the run folder alone; no text of rows or answers is in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from packhorse.data.seal import describe_looks
from packhorse.plan.run_plan import RunPlan
from packhorse.report.evaluation_words import change_words, interval_words, value_words, verdict_words
from packhorse.report.ledger_lines import ledger_lines
from packhorse.report.run_page import headline
from packhorse.report.run_report import RunReport

TEMPLATE: Final = "model_card.md.jinja"


def model_card(plan: RunPlan, report: RunReport) -> str:
    """Return the card of a run's model.

    Args:
        plan: Plan of the run.
        report: Figures of the run.
    """
    # Names of files and runs are text of users, and Markdown may hold HTML.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    evaluation = report.test_evaluation or report.evaluation
    base = plan.recipe.model.id or Path(plan.recipe.model.path or "").name  # a path is private
    limits = (
        f"The licence and the limits of its base, {base}, hold for it too."
        if base
        else "It has no base: its weights began at random."
    )
    return environment.get_template(TEMPLATE).render(
        report=report,
        hub_base=plan.recipe.model.id or "",
        limits=limits,
        method=plan.recipe.method.kind,
        headline=headline(report, report.name),
        training=list(_training(plan, report)),
        ledger=ledger_lines(report.data.ledger) if report.data is not None else (),
        metrics=list(_metrics(report)),
        looks=describe_looks(evaluation.test_looks) if evaluation is not None and evaluation.test_looks else "",
        hashes=report.hashes,
    )


def _training(plan: RunPlan, report: RunReport) -> Iterator[tuple[str, str]]:
    recipe = plan.recipe
    yield "method", recipe.method.kind
    yield "steps", f"{report.step:,}"
    yield "tokens in a pack", f"{recipe.batch.length:,}"
    yield "packs in a step", f"{recipe.batch.packs:,}"
    yield "learning rate", f"{recipe.optimizer.learning_rate:g}"
    yield "precision", recipe.precision
    yield "seed", str(recipe.seed)
    if report.data is not None:
        yield "stop token", f"`{report.data.stop_token}`"
        yield "sources", ", ".join(f"`{Path(source.path).name}`" for source in report.data.sources)


def _metrics(report: RunReport) -> Iterator[tuple[str, ...]]:
    for comparison in (report.evaluation, report.test_evaluation):
        for line in comparison.lines if comparison is not None else ():
            for result in line.metrics if line.group is None else ():
                if result.num_pairs:
                    change = change_words(result.difference, result.unit, with_unit=False)
                    interval = interval_words(result)
                    yield (
                        line.set,
                        result.metric,
                        value_words(result.base, result.unit),
                        value_words(result.tuned, result.unit),
                        f"{change} ({interval})" if interval else change,
                        verdict_words(result),
                    )
