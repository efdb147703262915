"""Check a recipe and its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packhorse.data.audit import audit
from packhorse.data.audit_report import AuditReport
from packhorse.data.resolve import runs_folder_of
from packhorse.launching.preflight import check_base_model
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
    """

    report: AuditReport
    page: Path


def check_recipe(recipe: Recipe) -> CheckedRecipe:
    """Check the model and the plan of a recipe, read and render its rows, and write data.html. Prepares nothing.

    Raises:
        UserError: Training would refuse model, method or settings; rows are wrong, or files are missing.
    """
    check_base_model(plan_on_some_machine(recipe, None))
    check_start(recipe)
    report, page = audit(recipe), page_path(recipe)
    # Now that the steps of an epoch are known.
    plan_on_some_machine(recipe, _facts(report))
    write_data_page(report, page)
    return CheckedRecipe(report, page)


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
    return runs_folder_of(recipe) / ".check" / recipe.name / "data.html"
