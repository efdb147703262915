"""Write the report of a run into its folder."""

from __future__ import annotations

from pathlib import Path

from packhorse.plan.run_plan import RunPlan
from packhorse.report.run_page import headline, write_run_page
from packhorse.report.run_report import read_report
from packhorse.run_folder.folder import relative


def report_run(plan: RunPlan) -> tuple[Path, str]:
    """Write RUN/report.html and RUN/report.json; return the path of the page, and the verdict in one sentence.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = Path(plan.run_folder)
    report = read_report(plan)
    shown = relative(folder)
    return write_run_page(report, folder, shown), headline(report, shown).sentence
