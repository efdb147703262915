"""Check a recipe and its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packhorse.data.audit import audit
from packhorse.data.audit_report import AuditReport
from packhorse.data.resolve import runs_folder_of
from packhorse.recipe.schema import Recipe
from packhorse.report.data_page import write_data_page


@dataclass(frozen=True)
class CheckedRecipe:
    """Result of a check.

    Attributes:
        report: Rows, splits, lengths and findings.
        page: Page with the whole report.
    """

    report: AuditReport
    page: Path


def check_recipe(recipe: Recipe, progress: Callable[[int], None] | None = None) -> CheckedRecipe:
    """Read and render the rows of a recipe, and write data.html. Prepares nothing.

    Args:
        recipe: Recipe with data sources.
        progress: Called with the number of rows done.

    Raises:
        UserError: Rows are wrong, or files are missing.
    """
    report, page = audit(recipe, progress), page_path(recipe)
    write_data_page(report, page)
    return CheckedRecipe(report, page)


def page_path(recipe: Recipe) -> Path:
    """Return the path of the page of a recipe."""
    return runs_folder_of(recipe) / ".check" / recipe.name / "data.html"
