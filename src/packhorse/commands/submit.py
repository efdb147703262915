"""`packhorse submit`: refuse early, show or send the jobs of a run, say what will run and when it may start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from packhorse.commands.plan import pairs
from packhorse.commands.planned_jobs import TIME_WORDS, Submission, planned_jobs, submission
from packhorse.commands.waiting import SITE_RECORD
from packhorse.errors import EXIT_OK
from packhorse.launching.run_folder import create_run, relative
from packhorse.launching.slurm.client import Expected, NoSlurmError, SlurmError, has_slurm
from packhorse.launching.slurm.jobs import JobRecord
from packhorse.launching.slurm.refusals import explained
from packhorse.launching.slurm.script import show
from packhorse.launching.slurm.submit import PlannedJob, check_jobs, refuse_live, sbatch_words, send
from packhorse.plan.resume import replace_plan


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        nodes: Nodes; None takes those of the run, or one.
        gpus_per_node: GPUs of each; None takes those of the run, or the site's.
        site: A site profile; empty takes the run's own, or `site.yaml` of this folder.
        time: Time limit of the job; empty takes the site's.
        dry_run: Only show.
        force: Even if the GPUs cannot hold it.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    site: str = ""
    time: str = ""
    dry_run: bool = False
    force: bool = False


def submit(recipe: str, overrides: Sequence[str], asked: dict[str, Any]) -> int:
    """Submits a recipe as a new run, or a run that is there to go on with it.

    Raises:
        UserError: Anything that the user can mend, before a job is sent; or Slurm refuses one.
    """
    wish, console = Asked(**asked), Console()
    found = submission(recipe, overrides, wish.site, wish.nodes, wish.gpus_per_node, wish.time, wish.force)
    folder, jobs = Path(found.plan.run_folder), planned_jobs(found)
    if wish.dry_run or not has_slurm():
        _show(console, folder, jobs)
        if not wish.dry_run:
            raise NoSlurmError("sbatch")
        return EXIT_OK
    if not found.is_new:
        refuse_live(folder)
    expected = check_jobs(found.site, jobs)
    if found.is_new:
        create_run(found.plan, found.files)
    elif found.is_replanned:
        replace_plan(found.plan)
    (folder / SITE_RECORD).write_text(found.site.model_dump_json(indent=2) + "\n", encoding="utf-8")
    try:
        records = send(folder, jobs, expected)
    except SlurmError as error:
        raise explained(error, found.site, jobs[-1].request) from error
    _tell(console, found, jobs, records, expected)
    return EXIT_OK


def _show(console: Console, folder: Path, jobs: Sequence[PlannedJob]) -> None:
    """The scripts and commands, as they would be written and typed."""
    before: tuple[str, ...] = ()
    for job in jobs:
        _plain(console, f"# {folder / job.script_name}\n{job.script}")
    _plain(console, "# commands")
    for job in jobs:
        _plain(console, show(["sbatch", "--parsable", *sbatch_words(folder, job, before)]))
        before = (f"JOB_{job.kind}",)


def _plain(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tell(
    console: Console,
    found: Submission,
    jobs: Sequence[PlannedJob],
    records: Sequence[JobRecord],
    expected: Sequence[Expected],
) -> None:
    plan, folder = found.plan, relative(found.plan.run_folder)
    topology = plan.topology
    steps = f"{plan.num_steps:,} steps" if plan.num_steps is not None else "steps are counted when the data is prepared"
    where = f"{topology.num_nodes} x {topology.processes_per_node} {topology.device}, {topology.engine}; {steps}"
    lines = [("run", folder), ("plan", where), ("memory", found.memory_words)]
    for job, record, start in zip(jobs, records, expected, strict=True):
        lines.append((f"job {record.job_id}", f"{job.kind}: {_size(job)}; {_when(record, start)}"))
    lines += [("time", found.time_words)] if found.time_words else []
    lines += [("saving", f"asked for {found.lead.seconds} s before the time limit: {found.lead.reason}")]
    lines += [("next", f"packhorse status {folder}")]
    console.print(pairs(lines))


def _size(job: PlannedJob) -> str:
    asked = job.request
    parts = [f"{asked.num_nodes} node{'s' * (asked.num_nodes > 1)}"]
    parts += [f"{asked.gpus_per_node} GPUs each"] if asked.gpus_per_node else []
    parts += [f"{asked.cpus_per_node} CPUs each"] if asked.cpus_per_node else []
    return f"{', '.join(parts)}, {asked.time} {TIME_WORDS}"


def _when(record: JobRecord, start: Expected) -> str:
    if record.depends_on:
        return f"begins when job {' and '.join(record.depends_on)} has ended well"
    if start.starts_at is None:
        return "Slurm does not say when it may start"
    at = datetime.fromtimestamp(start.starts_at).astimezone().isoformat(sep=" ", timespec="seconds")
    return f"may start at {at} on {start.nodes} (partition {start.partition})"
