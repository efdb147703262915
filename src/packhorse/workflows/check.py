"""Check a recipe and its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packhorse.data.audit import audit
from packhorse.data.audit_report import AuditReport
from packhorse.data.gather.bad_rows import MISTAKES_FILE
from packhorse.data.resolve import check_folder
from packhorse.launching.preflight import check_base_model, check_teacher_folder
from packhorse.plan.run_plan import DataFacts
from packhorse.recipe.schema import Recipe
from packhorse.report.data_page import write_data_page
from packhorse.workflows.early_checks import check_start, plan_on_some_machine


@dataclass(frozen=True)
class CheckedRecipe:
    """Result of a check.

    Attributes:
        report: Rows, splits, lengths and findings.
        page: Page with the whole report.
        bad_rows: File that lists the bad rows that were dropped; None if there are none.
    """

    report: AuditReport
    page: Path
    bad_rows: Path | None


def check_recipe(recipe: Recipe, progress: Callable[[int], None] | None = None) -> CheckedRecipe:
    """Check the model and the plan of a recipe, read and render its rows, and write data.html. Prepares nothing.

    Args:
        recipe: Recipe with data sources.
        progress: Called with the number of rows done.

    Raises:
        UserError: Training would refuse model, method or settings; rows are wrong, or files are missing.
    """
    plan = plan_on_some_machine(recipe, None)
    check_base_model(plan)
    check_teacher_folder(plan)
    check_start(recipe)
    report, page = audit(recipe, progress), page_path(recipe)
    # Now that the steps of an epoch are known.
    plan_on_some_machine(recipe, _facts(report))
    write_data_page(report, page)
    bad_rows = page.with_name(MISTAKES_FILE)
    return CheckedRecipe(report, page, bad_rows if bad_rows.is_file() else None)


def _facts(report: AuditReport) -> DataFacts:
    train = report.splits["train"]
    return DataFacts(
        folder="",
        content_hash="",
        tokenizer=report.tokenizer,
        num_rows=train.num_rows,
        num_packs=train.num_packs,
        num_tokens=train.num_tokens,
        num_supervised_tokens=round(train.num_tokens * report.supervised_share),
        fill=train.fill,
    )


def page_path(recipe: Recipe) -> Path:
    """Return the path of the page of a recipe."""
    return check_folder(recipe) / "data.html"
