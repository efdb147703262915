"""From a recipe or a run to its jobs on a cluster, and their submission."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from packhorse.errors import UserError
from packhorse.estimate.checkpoint_size import CheckpointSpace
from packhorse.launching.slurm.client import SlurmError, StartEstimate
from packhorse.launching.slurm.refusals import explain_refusal
from packhorse.launching.slurm.script import (
    SignalLead,
    check_path,
    cpu_request,
    signal_lead,
    train_request,
)
from packhorse.launching.slurm.site import DURATION, SITE_FILE, SiteProfile, load_site, seconds_of
from packhorse.launching.slurm.submit import PlannedJob, check_jobs, planned_job, refuse_live, send
from packhorse.plan.replan import replace_plan, replan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.locate import expand
from packhorse.run_folder.folder import create_run, named_folder, open_run, relative
from packhorse.run_folder.jobs import JobRecord
from packhorse.run_folder.layout import LOGS_FOLDER, METRICS_FILE, PLAN_FILE, SITE_RECORD, SWEEP_FILE
from packhorse.run_folder.metrics import read_metrics
from packhorse.workflows.model_shape import Unknown
from packhorse.workflows.new_run import Machine, NewRun, load_single, plan_new_run
from packhorse.workflows.plan_basis import on_known_gpus, room_on_disk
from packhorse.workflows.prepare import site_terms
from packhorse.workflows.resume_run import check_resume, refuse_finished

GIB: Final = 2**30


@dataclass(frozen=True)
class SubmitRequest:
    """What the user requests from the cluster.

    Attributes:
        nodes: Number of nodes; None takes those of the run, or one.
        gpus_per_node: GPUs of each node; None takes those of the run, or the site's.
        site: Site profile; empty takes the run's own, or `site.yaml` of the current folder.
        time: Time limit of one job; empty takes the site's.
        force: Whether to submit even if the GPUs cannot hold the plan.
        at_once: Largest number of runs of a sweep at the same time; None leaves it to Slurm.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    site: str = ""
    time: str = ""
    force: bool = False
    at_once: int | None = None


@dataclass(frozen=True)
class Submission:
    """A run that may be submitted.

    Attributes:
        plan: Plan of the run; without data if a job prepares the data first.
        site: Profile of the cluster, with the requested time limit.
        is_new: Whether the run folder does not exist yet.
        lead: How long before its end a job is asked to save.
        memory_words: What is known about memory.
        is_replanned: Whether the run resumes under another plan.
        files: Files of a new run folder, apart from plan and recipe.
    """

    plan: RunPlan
    site: SiteProfile
    is_new: bool
    lead: SignalLead
    memory_words: str
    is_replanned: bool = False
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def time_words(self) -> str:
        """Training time and time limit in words; empty if the training time is not known."""
        predicted, steps = self.plan.predicted, self.plan.num_steps
        if predicted is None or steps is None:
            return ""
        hours = predicted.step_seconds * steps / 3600
        more = hours * 3600 > seconds_of(self.site.time)
        next_job = "; the run resumes automatically in the next job" if more else ""
        return f"about {hours:,.1f} h of steps; each job may take {self.site.time}{next_job}"


def submission(recipe: str, overrides: Sequence[str], request: SubmitRequest) -> Submission:
    """Plan a new run of a recipe, or take an existing run. Refuses all that can be refused without Slurm.

    Raises:
        UserError: The run cannot be submitted.
    """
    run = Path(open_run(recipe).run_folder) if is_run(recipe) else None
    site, gpus_per_node = with_time(_site(request.site, run), request.time), request.gpus_per_node
    if gpus_per_node is not None and gpus_per_node > site.gpus_per_node:
        raise UserError(
            f"--gpus-per-node is {gpus_per_node}, and a node of {site.name} has {site.gpus_per_node} GPUs.",
            "Slurm would never find such a node.",
            f"request {site.gpus_per_node} or fewer and more --nodes; on nodes without GPUs remove it."
            if site.gpus_per_node
            else "remove it: the nodes share parallel.processes of the recipe.",
        )
    if run is None:
        return _new(recipe, overrides, site, request)
    return _existing(run, overrides, site, request.nodes, gpus_per_node)


def planned_jobs(submission: Submission) -> list[PlannedJob]:
    """Return the jobs of a run in order: preparation if the data is not prepared, and training.

    Raises:
        UserError: A value would break a script, or the time limit leaves no time to train.
    """
    plan, site, lead = submission.plan, submission.site, submission.lead
    folder = Path(plan.run_folder)
    if lead.seconds >= seconds_of(site.time):
        raise UserError(
            f"the job may take {site.time}, and {lead.seconds} s of it are kept for saving.",
            f"{lead.reason}.",
            f"set --time to more than {lead.seconds} s.",
        )
    name, has_data = plan.recipe.name, plan.data is not None
    return [*([] if has_data else [prepare_job(site, name, folder)]), train_job(submission, name, folder)]


def train_job(submission: Submission, name: str, folder: Path) -> PlannedJob:
    """Return the job that trains a run, or one task for each run of a sweep in this folder."""
    site, topology = submission.site, submission.plan.topology
    gpus = topology.processes_per_node if topology.device == "cuda" else 0
    size = (topology.num_nodes, gpus, site.time, submission.lead.seconds)
    return planned_job(site, "train", train_request(site, name, folder / LOGS_FOLDER, *size), str(folder))


def prepare_job(site: SiteProfile, name: str, folder: Path) -> PlannedJob:
    """Return the job that prepares the data of a run or a sweep."""
    request = cpu_request(site, name, folder / LOGS_FOLDER, "prepare")
    return planned_job(site, "prepare", request, "prepare", str(folder))


def check_submission(submission: Submission, jobs: Sequence[PlannedJob]) -> list[StartEstimate]:
    """DeviceRequest Slurm whether it would accept the jobs; return when each may start.

    Raises:
        UserError: Slurm refuses a job or is not available, or a job of the run waits or runs.
    """
    if not submission.is_new:
        refuse_live(Path(submission.plan.run_folder))
    return check_jobs(submission.site, jobs)


def send_jobs(submission: Submission, jobs: Sequence[PlannedJob], expected: Sequence[StartEstimate]) -> list[JobRecord]:
    """Create the run folder or replace its plan, then submit the jobs.

    Raises:
        UserError: The folder cannot be written, or Slurm refuses a job.
    """
    make_run(submission)
    try:
        return send(Path(submission.plan.run_folder), jobs, expected)
    except SlurmError as error:
        raise explain_refusal(error, submission.site, jobs[-1].request) from error


def make_run(submission: Submission) -> None:
    """Create the run folder or replace its plan, and record the site profile in it.

    Raises:
        UserError: The folder holds another run, or cannot be written.
    """
    if submission.is_new:
        create_run(submission.plan, submission.files)
    elif submission.is_replanned:
        replace_plan(submission.plan)
    record = Path(submission.plan.run_folder) / SITE_RECORD
    record.write_text(submission.site.model_dump_json(indent=2) + "\n", encoding="utf-8")


def with_time(site: SiteProfile, time: str) -> SiteProfile:
    """Return the profile with the requested time limit.

    Raises:
        UserError: It is not a time, or longer than the site allows.
    """
    if not time:
        return site
    if DURATION.fullmatch(time) is None:
        raise UserError(
            f"--time is {time!a}.",
            "the time limit of a job has hours, minutes and seconds, and may have days.",
            "write for example --time 12:00:00 or --time 1-12:00:00.",
        )
    if site.longest_time and seconds_of(time) > seconds_of(site.longest_time):
        raise UserError(
            f"--time is {time}, and longest_time of {site.name} is {site.longest_time}.",
            "the site starts no longer job.",
            f"set --time to {site.longest_time} or less: a longer run resumes in the next job.",
        )
    return site.model_copy(update={"time": time})


def is_run(name: str) -> bool:
    """Return whether the name or path belongs to a run or a sweep."""
    return any((named_folder(name) / file).is_file() for file in (PLAN_FILE, SWEEP_FILE))


def _site(site: str, run: Path | None) -> SiteProfile:
    record = run / SITE_RECORD if run is not None else None
    if not site and record is not None and record.is_file():
        return SiteProfile.model_validate_json(record.read_text(encoding="utf-8"))
    return load_site(site or None)


def _new(recipe: str, overrides: Sequence[str], site: SiteProfile, request: SubmitRequest) -> Submission:
    nodes, gpus_per_node = request.nodes or 1, request.gpus_per_node or site.gpus_per_node
    on_cpus = site.gpus_per_node == 0
    machine = Machine(
        DeviceRequest(None if on_cpus else nodes * gpus_per_node, nodes, on_cpus),
        _node(site),
        site_terms(site),
        (lambda draft: check_path(Path(draft.run_folder)), lambda draft: check_shared(site, Path(draft.run_folder))),
    )
    run = plan_new_run(load_single(recipe, overrides), machine, None, request.force)
    return Submission(run.plan, site, True, _lead(run.plan, run.room), _memory_words(run, on_cpus), files=run.files)


def _existing(
    folder: Path, overrides: Sequence[str], site: SiteProfile, nodes: int | None, gpus_per_node: int | None
) -> Submission:
    before = open_run(str(folder))
    status = refuse_finished(before)
    check_shared(site, folder)
    topology, on_cpus = before.topology, before.topology.device == "cpu"
    size = (nodes or topology.num_nodes, gpus_per_node or topology.processes_per_node)
    moves = size != (topology.num_nodes, topology.processes_per_node)
    if before.data is None and (moves or overrides):
        raise UserError(
            f"{relative(folder)} waits for its data, and is planned for {topology.num_nodes} nodes.",
            "its plan is completed when the data is prepared.",
            "remove --nodes, --gpus-per-node and overrides, or submit the recipe under another name.",
        )
    plan = before
    if moves or overrides:
        ask = DeviceRequest(None if on_cpus else size[0] * size[1], size[0], on_cpus) if moves else DeviceRequest()
        ask = on_known_gpus(ask, _node(site), site_terms(site))
        plan = replan(before, overrides, ask, _node(site), attempt=status.attempt if status is not None else 0)
    if plan.data is not None:
        manifest, room = check_resume(plan)
    else:
        manifest, room = None, room_on_disk(plan, None)
    run = NewRun(plan, manifest, room, Unknown("gpu of the site is not set"))
    return Submission(plan, site, False, _lead(plan, room), _memory_words(run, on_cpus), is_replanned=plan != before)


def check_shared(site: SiteProfile, folder: Path) -> None:
    """Refuse a run folder that the nodes do not see, if the profile lists the folders that they see.

    Raises:
        UserError: The folder is in none of them.
    """
    seen = [Path(expand(text)).resolve() for text in site.shared]
    if not seen or any(folder.resolve().is_relative_to(each) for each in seen):
        return
    raise UserError(
        f"{folder} is in none of the folders that the nodes of {site.name} see: {', '.join(map(str, seen))}.",
        "every node reads the plan and writes its checkpoints there.",
        f"set runs_folder to a folder in one of them, or complete `shared` of the profile ({SITE_FILE}).",
    )


def _node(site: SiteProfile) -> Hardware:
    return Hardware(num_cores=site.cpus_per_node or 1, gpus=())


def _lead(plan: RunPlan, room: CheckpointSpace | None) -> SignalLead:
    return signal_lead(
        read_metrics(Path(plan.run_folder) / METRICS_FILE),
        plan.predicted.step_seconds if plan.predicted is not None else None,
        room.each_bytes if room is not None else None,
    )


def _memory_words(run: NewRun, on_cpus: bool) -> str:
    predicted = run.plan.predicted
    if predicted is not None:
        figures = f"{predicted.required_bytes / GIB:.1f} of {predicted.memory_bytes / GIB:.1f} GiB"
        draft = "" if run.plan.data is not None else "at least, checked again when the data is prepared: "
        return f"{draft}{figures} of {predicted.gpu}"
    if on_cpus:
        return "not checked: the nodes have no GPUs"
    return f"not checked: {run.basis.reason}" if isinstance(run.basis, Unknown) else "not checked"
