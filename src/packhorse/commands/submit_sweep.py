"""`packhorse submit` of a recipe with a sweep: a run folder for each run, and one job array that trains them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from packhorse.commands.lines import pairs
from packhorse.commands.planned_jobs import Asked, Submission, planned_jobs, programs_of, submission
from packhorse.commands.sending import make_run, show_plain, size_words, when_words
from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.slurm.client import NoSlurmError, SlurmError, StartEstimate
from packhorse.launching.slurm.jobs import submit_job
from packhorse.launching.slurm.refusals import explain_refusal
from packhorse.launching.slurm.script import command_script, cpu_request, show, train_request, train_script
from packhorse.launching.slurm.submit import PlannedJob, check_jobs, sbatch_arguments
from packhorse.plan.make_plan import run_folder_of
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import SweepRun, expand
from packhorse.run_folder.folder import check_free, relative
from packhorse.run_folder.jobs import JobRecord, append_job
from packhorse.run_folder.layout import ARRAY_JOB_LOG, LOGS_FOLDER, job_log_name
from packhorse.run_folder.sweep import create_sweep, member_folder


@dataclass(frozen=True)
class Sweep:
    """A sweep that is to be submitted.

    Attributes:
        recipe: The recipe as it was typed.
        folder: Of the sweep; its runs stand beside it.
        runs: Which there are.
        found: Each as it would be submitted alone.
        jobs: Those of the whole sweep: one that prepares what data is not prepared yet, and the array.
        at_once: Tasks of the array that may run at the same time; None leaves it to Slurm.
    """

    recipe: str
    folder: Path
    runs: Sequence[SweepRun]
    found: Sequence[Submission]
    jobs: Sequence[PlannedJob]
    at_once: int | None


def submit_sweep(recipe: str, overrides: Sequence[str], asked: Asked) -> int:
    """Submits every run of a sweep, or shows what would be submitted.

    Raises:
        UserError: Anything that the user can mend in any of the runs; or Slurm refuses the array.
    """
    loaded = load_recipe(recipe, overrides)
    folder = run_folder_of(loaded)
    check_free(folder)
    runs = expand(loaded)
    found = []
    for run in runs:
        own = [*overrides, "sweep={}", f"name={run.recipe.name}", *run.overrides]
        found.append(submission(recipe, own, asked))
    sweep = Sweep(recipe, folder, runs, found, _jobs(folder, runs, found), asked.at_once)
    console = Console()
    if asked.dry_run:
        _show(console, sweep)
        return EXIT_OK
    try:
        expected = check_jobs(found[0].site, sweep.jobs)
    except NoSlurmError:
        _show(console, sweep)
        raise
    create_sweep(folder, recipe, runs)
    for each in found:
        make_run(each)
        (Path(each.plan.run_folder) / LOGS_FOLDER).mkdir(exist_ok=True)
    try:
        records = _send(sweep, expected)
    except UserError:
        # Nothing of it ran: its names are free again.
        for made in (folder, *(member_folder(folder, run.number) for run in runs)):
            shutil.rmtree(made)
        raise
    _tell(console, sweep, records, expected)
    return EXIT_OK


def array_words(sweep: Sweep) -> list[str]:
    """Options of the array: a task for each run, whose log stands with that run (filename pattern in sbatch(1))."""
    most = f"%{sweep.at_once}" if sweep.at_once is not None else ""
    return [f"--array=1-{len(sweep.runs)}{most}", f"--output={sweep.folder}-%a/{LOGS_FOLDER}/{ARRAY_JOB_LOG}"]


def _jobs(folder: Path, runs: Sequence[SweepRun], found: Sequence[Submission]) -> list[PlannedJob]:
    """The jobs of the first run, for all of them: they must ask for the same."""
    sizes = {(each.plan.topology.num_nodes, each.plan.topology.processes_per_node): each for each in found}
    if len(sizes) > 1:
        (one, other), names = sizes, [each.plan.recipe.name for each in sizes.values()]
        raise UserError(
            f"{names[0]} runs on {one[0]} x {one[1]} processes and {names[1]} on {other[0]} x {other[1]}.",
            "the tasks of a job array all ask for the same nodes.",
            "sweep over other fields, or submit these runs one by one.",
        )
    for each in found:
        planned_jobs(each)  # refuses what no job of this run could do
    latest = max(found, key=lambda each: each.lead.seconds)
    site, topology, logs = latest.site, latest.plan.topology, folder / LOGS_FOLDER
    gpus = topology.processes_per_node if topology.device == "cuda" else 0
    asked = train_request(site, folder.name, logs, topology.num_nodes, gpus, site.time, latest.lead.seconds)
    jobs = [PlannedJob("train", asked, train_script(site, asked, programs_of(site)), (str(folder),))]
    if any(each.plan.data is None for each in found):
        asked = cpu_request(site, folder.name, logs, "prepare")
        script = command_script(site, asked, programs_of(site))
        jobs.insert(0, PlannedJob("prepare", asked, script, ("prepare", str(folder))))
    return jobs


def _send(sweep: Sweep, expected: Sequence[StartEstimate]) -> list[JobRecord]:
    """Submits the jobs, and writes them down for the sweep and for each run as that run alone would be submitted."""
    folder = sweep.folder
    records: list[JobRecord] = []
    for job in sweep.jobs:
        (folder / job.script_name).write_text(job.script, encoding="utf-8")
    for job, start in zip(sweep.jobs, expected, strict=True):
        depends_on = tuple(each.job_id for each in records)
        options = array_words(sweep) if job.kind == "train" else []
        words = sbatch_arguments(folder, job, depends_on, options)
        try:
            record = submit_job(words, job.kind, depends_on, None if depends_on else start.starts_at)
        except SlurmError as error:
            if records:
                SlurmClient().cancel([each.job_id for each in records])
            raise explain_refusal(error, sweep.found[0].site, job.request) from error
        append_job(folder, record)
        for run in sweep.runs:
            append_job(member_folder(folder, run.number), _of_one(record, sweep, job, run.number))
        records.append(record)
    return records


def _of_one(record: JobRecord, sweep: Sweep, job: PlannedJob, number: int) -> JobRecord:
    """A job of the sweep as one run has it, with the words that submit it for that run alone."""
    run = member_folder(sweep.folder, number)
    job_id = f"{record.job_id}_{number}" if record.kind == "train" else record.job_id
    name = "job" if record.kind == "train" else record.kind
    words = [
        f"--output={run / LOGS_FOLDER / job_log_name(name)}",
        str(sweep.folder / job.script_name),
        *job.words[:-1],
        str(run),
    ]
    return record.model_copy(update={"job_id": job_id, "argv": ("sbatch", "--parsable", *words)})


def _show(console: Console, sweep: Sweep) -> None:
    folder = sweep.folder
    for run in sweep.runs:
        show_plain(console, f"# {member_folder(folder, run.number)}: {' '.join(run.overrides)}")
    before: tuple[str, ...] = ()
    commands = []
    for job in sweep.jobs:
        show_plain(console, f"# {folder / job.script_name}\n{job.script}")
        options = array_words(sweep) if job.kind == "train" else []
        commands.append(show(["sbatch", "--parsable", *sbatch_arguments(folder, job, before, options)]))
        before = (f"JOB_{job.kind}",)
    show_plain(console, "\n".join(["# commands", *commands]))


def _tell(console: Console, sweep: Sweep, records: Sequence[JobRecord], expected: Sequence[StartEstimate]) -> None:
    lines = [("sweep", f"{relative(sweep.folder)}, {len(sweep.runs)} runs")]
    lines += [(f"run {run.number}", f"{run.recipe.name}: {' '.join(run.overrides)}") for run in sweep.runs]
    for job, record, start in zip(sweep.jobs, records, expected, strict=True):
        each = ", each task" if job.kind == "train" else ""
        lines.append((f"job {record.job_id}", f"{job.kind}{each}: {size_words(job)}; {when_words(record, start)}"))
    lines.append(("next", f"packhorse status {relative(sweep.folder)}"))
    console.print(pairs(lines))
