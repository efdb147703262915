"""Resume a run where it ran before: on this machine, or by submitting its unfinished jobs again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packhorse.data.data_manifest import DataManifest
from packhorse.errors import UserError
from packhorse.estimate.checkpoint_size import CheckpointSpace
from packhorse.estimate.plan_estimate import PlanEstimate
from packhorse.estimate.search.candidates import SearchRequest
from packhorse.estimate.search.changes import refuse_unfit
from packhorse.launching.preflight import check_disk, check_resumable
from packhorse.launching.slurm.job_reports import jobs_of_runs, read_ends, report_jobs
from packhorse.launching.slurm.jobs import resubmit, unfinished_jobs, with_states
from packhorse.launching.slurm.submit import only_submission
from packhorse.plan.make_plan import run_folder_of
from packhorse.plan.replan import replan
from packhorse.plan.run_plan import RunPlan, read_plan
from packhorse.plan.topology import DeviceRequest, Hardware, check_machine, detect_hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.shipped import find_recipe
from packhorse.run_folder.attempts import newest_chain
from packhorse.run_folder.folder import named_folder, open_run, relative
from packhorse.run_folder.jobs import JobRecord, read_jobs
from packhorse.run_folder.layout import CANCEL_FILE, PLAN_FILE
from packhorse.run_folder.status import Status, read_status
from packhorse.run_folder.sweep import find_sweep
from packhorse.workflows.model_shape import Unknown
from packhorse.workflows.new_run import Reporter, RunEnd, launch_here
from packhorse.workflows.plan_basis import GpuTerms, basis_of, on_known_gpus, room_on_disk
from packhorse.workflows.prepared_data import require_manifest


@dataclass(frozen=True)
class ResumedJobs:
    """Jobs that were submitted again.

    Attributes:
        jobs: Run folder and job, in the order of submission.
        num_finished: Runs of a sweep that are finished.
        num_live: Runs of a sweep that wait or run.
    """

    jobs: Sequence[tuple[Path, JobRecord]]
    num_finished: int = 0
    num_live: int = 0


def resume(
    run: str,
    overrides: Sequence[str] = (),
    gpus: int | None = None,
    restarts: int | None = None,
    force: bool = False,
    reporter: Reporter = Reporter(),  # noqa: B008
) -> RunEnd | ResumedJobs:
    """Resume a run, or the unfinished runs of a sweep.

    Args:
        run: Name or folder of the run or sweep.
        overrides: Overrides that do not change what is learned; for a run of this machine only.
        gpus: Number of processes, one per GPU; for a run of this machine only.
        restarts: Attempts that may follow a failed one; for a run of this machine only.
        force: Whether to run even if the GPUs cannot hold the plan.
        reporter: Where progress is reported.

    Raises:
        UserError: There is no such run, it is running or finished, or Slurm refuses a job.
    """
    _refuse_recipe(run)
    sweep = find_sweep(run)
    folder = sweep or Path(open_run(run).run_folder)
    submitted = [record for record in read_jobs(folder) if record.goes_on_from is None]
    if sweep is None and not submitted:
        _refuse_job_of_hand(folder)
        return resume_here(run, overrides, gpus, restarts, force, reporter)
    given = [*overrides, *([f"--gpus {gpus}"] if gpus else []), *([f"--restarts {restarts}"] if restarts else [])]
    if given:
        raise UserError(
            f"{relative(folder)} runs as jobs of Slurm, and resume came with {' '.join(given)}.",
            "its jobs are submitted again with the scripts in the run folder.",
            f"remove it; or resume on this machine with `packhorse train {relative(folder)} --resume`, which takes it.",
        )
    if sweep is not None:
        return _resume_sweep(sweep)
    again = _submit_again(folder)
    if not again:
        raise UserError(
            f"{relative(folder)} is finished: all of its jobs succeeded.",
            "there is nothing left to run.",
            f"see `packhorse status {relative(folder)}`.",
        )
    return ResumedJobs([(folder, record) for record in again])


def _refuse_recipe(name: str) -> None:
    """Refuse the name of a recipe, which is not the name of its run."""
    if (named_folder(name) / PLAN_FILE).is_file() or not (Path(name).is_file() or find_recipe(name) is not None):
        return
    folder = run_folder_of(load_recipe(name))
    command = f"packhorse resume {relative(folder)}"
    if not (folder / PLAN_FILE).is_file():
        command = f"packhorse train {name}"
    raise UserError(
        f"{name} is a recipe, and only a run can be resumed; its run folder is {relative(folder)}"
        f"{'' if (folder / PLAN_FILE).is_file() else ', which does not exist yet'}.",
        "the run folder holds the plan and the checkpoints from which a run resumes.",
        f"run `{command}`.",
    )


def _refuse_job_of_hand(folder: Path) -> None:
    if newest_chain(folder):
        raise UserError(
            f"{relative(folder)} ran in Slurm job {newest_chain(folder)}, which was submitted by hand.",
            "Packhorse does not know the nodes and limits of that job.",
            f"submit it again as before (sbatch … slurm/job.sbatch {relative(folder)}), or with `packhorse submit "
            f"{relative(folder)}`; or resume on this machine with `packhorse train {relative(folder)} --resume`.",
        )


def resume_here(
    run: str,
    overrides: Sequence[str] = (),
    gpus: int | None = None,
    restarts: int | None = None,
    force: bool = False,
    reporter: Reporter = Reporter(),  # noqa: B008
) -> RunEnd:
    """Resume a run on this machine, wherever it ran before.

    Raises:
        UserError: There is no such run, it is running or finished, or it cannot resume on this machine.
    """
    _refuse_recipe(run)
    before = open_run(run)
    return launch_here(lambda: _plan_here(before, overrides, gpus, force), before, restarts, reporter)


def _plan_here(before: RunPlan, overrides: Sequence[str], gpus: int | None, force: bool) -> RunPlan:
    status, here = refuse_finished(before), detect_hardware()
    ask = on_known_gpus(DeviceRequest(gpus), here, GpuTerms())
    plan = replan(before, overrides, ask, here, attempt=status.attempt if status is not None else 0)
    check_machine(plan.topology, here)
    manifest, _ = check_resume(plan)
    return plan if plan == before else _still_fitting(plan, manifest, here, force)


def refuse_finished(plan: RunPlan) -> Status | None:
    """Return the status of a run that has steps left.

    Raises:
        UserError: The run is finished.
    """
    status = read_status(Path(plan.run_folder))
    if status is None or status.state != "finished":
        return status
    name = relative(plan.run_folder)
    ended = f"; it {status.message}" if status.message else ""
    raise UserError(
        f"{name} is finished: {status.step} of {status.num_steps} steps are done{ended}.",
        "there is nothing left to train.",
        f"see `packhorse evaluate {name}`, or train longer under another name.",
    )


def check_resume(plan: RunPlan) -> tuple[DataManifest, CheckpointSpace | None]:
    """Return the data of a run that can resume, and the disk space of its checkpoints.

    Raises:
        UserError: Checkpoints or data do not allow it, or the disk has no space.
    """
    check_resumable(plan)
    manifest = require_manifest(plan)
    room = room_on_disk(plan, manifest.vocab_size)
    check_disk(plan, room)
    return manifest, room


def _still_fitting(plan: RunPlan, manifest: DataManifest, here: Hardware, force: bool) -> RunPlan:
    """Return a changed plan with its estimate; its GPUs must hold it like a new one."""
    basis = basis_of(plan.recipe, manifest, here, GpuTerms())
    if isinstance(basis, Unknown) or plan.topology.device == "cpu":
        return plan
    if not force:
        ask = DeviceRequest(plan.topology.world_size, plan.topology.num_nodes)
        refuse_unfit(SearchRequest(plan.recipe, ask, here, plan.data), PlanEstimate(plan, basis))
    return PlanEstimate(plan, basis).predicted_plan()


def _resume_sweep(sweep: Path) -> ResumedJobs:
    """Submit each unfinished run as its own job; runs that wait or run are left alone."""
    live = done = 0
    jobs: list[tuple[Path, JobRecord]] = []
    for run, records in jobs_of_runs(sweep).items():
        if any(state is not None and state.is_live for _, state in records):
            live += 1
        elif again := _submit_again(run):
            jobs += [(run, record) for record in again]
        else:
            done += 1
    return ResumedJobs(jobs, done, live)


def _submit_again(folder: Path) -> list[JobRecord]:
    has_data = read_plan(folder).data is not None
    with only_submission(folder):
        jobs = with_states(read_jobs(folder))
        left = unfinished_jobs(report_jobs(jobs, read_ends(folder), read_status(folder), has_data))
        if left:
            (folder / CANCEL_FILE).unlink(missing_ok=True)
        return resubmit(folder, left)
