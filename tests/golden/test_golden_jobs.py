"""Job scripts for three kinds of cluster and the commands that submit them, as text for review by an administrator."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from packhorse.cli.show.submission import show_jobs
from packhorse.launching.slurm.script import signal_lead
from packhorse.launching.slurm.site import load_site, shipped_sites
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.workflows.submit_run import Submission, planned_jobs

HERE = Path(__file__).parent / "jobs"
RUNS = {"cloud": "/fsx/runs", "container": "/p/scratch/runs", "university": "/work/ab1234/runs"}


@pytest.mark.parametrize("name", shipped_sites())
def test_job_scripts_are_as_reviewed(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = load_site(name)
    monkeypatch.setattr("sys.executable", "/work/packhorse/.venv/bin/python")
    monkeypatch.setenv("COLUMNS", "110")
    recipe = load_recipe("llama3.1-8b/lora", [f"runs_folder={RUNS[name]}", "name=first"], check_environment=False)
    plan = make_plan(recipe, DeviceRequest(gpus=2 * site.gpus_per_node, nodes=2), Hardware(num_cores=2, gpus=()), None)
    found = Submission(plan, site, is_new=True, lead=signal_lead([], 12.0, 10**9), memory_words="")
    show_jobs(Console(), Path(plan.run_folder), planned_jobs(found))
    text = capsys.readouterr().out
    golden = HERE / f"{name}.txt"
    if request.config.getoption("--write-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
