"""Check a recipe and its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packhorse.data.audit import audit
from packhorse.data.audit_report import AuditReport
from packhorse.data.gather.bad_rows import MISTAKES_FILE
from packhorse.data.resolve import check_folder
from packhorse.recipe.schema import Recipe
from packhorse.report.data_page import write_data_page


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
    """Read and render the rows of a recipe, and write data.html. Prepares nothing.

    Args:
        recipe: Recipe with data sources.
        progress: Called with the number of rows done.

    Raises:
        UserError: Rows are wrong, or files are missing.
    """
    report, page = audit(recipe, progress), page_path(recipe)
    write_data_page(report, page)
    bad_rows = page.with_name(MISTAKES_FILE)
    return CheckedRecipe(report, page, bad_rows if bad_rows.is_file() else None)


def page_path(recipe: Recipe) -> Path:
    """Return the path of the page of a recipe."""
    return check_folder(recipe) / "data.html"
