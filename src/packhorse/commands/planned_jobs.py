"""From a recipe or a run to the jobs that it takes on a cluster; nothing is written or sent."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from packhorse.commands.costs import basis_of, room_on_disk
from packhorse.commands.fitting import draft_plan, fitting_plan
from packhorse.commands.parameters import Unknown
from packhorse.commands.prepared import facts_of, require_data
from packhorse.commands.waiting import terms_of
from packhorse.data.content_key import find_prepared
from packhorse.data.data_manifest import read_data_manifest, require_sizes
from packhorse.data.resolve import data_root
from packhorse.errors import UserError
from packhorse.estimate.checkpoint_size import CheckpointSpace
from packhorse.estimate.search.candidates import SearchRequest
from packhorse.launching.preflight import check_base_model, check_disk, check_resumable, check_writable
from packhorse.launching.slurm.script import (
    SignalLead,
    check_path,
    command_script,
    cpu_request,
    signal_lead,
    train_request,
    train_script,
)
from packhorse.launching.slurm.site import DURATION, SITE_FILE, SiteProfile, load_site, seconds_of
from packhorse.launching.slurm.submit import PlannedJob
from packhorse.plan.make_plan import run_folder_of
from packhorse.plan.replan import replan
from packhorse.plan.run_plan import Decision, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.locate import expand
from packhorse.recipe.sweep import check_single
from packhorse.run_folder.folder import check_free, named_folder, open_run, relative
from packhorse.run_folder.layout import DATA_FILE, LOGS_FOLDER, METRICS_FILE, PLAN_FILE, SITE_RECORD, SWEEP_FILE
from packhorse.run_folder.metrics import read_metrics
from packhorse.run_folder.status import read_status

TIME_WORDS: Final = "at most"
GIB: Final = 2**30


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
        at_once: Runs of a sweep that may run at the same time; None leaves it to Slurm.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    site: str = ""
    time: str = ""
    dry_run: bool = False
    force: bool = False
    at_once: int | None = None


@dataclass(frozen=True)
class Submission:
    """What is to be submitted.

    Attributes:
        plan: Of the run; without data where a job prepares it first.
        site: Where it runs, with the time limit that was asked for.
        is_new: The run folder is not there yet.
        is_replanned: The run goes on under another plan than before.
        files: What a new run folder holds beside the plan.
        lead: How long before its end the job is told.
        memory_words: What is known of memory.
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
        """How long training takes beside the time limit, where it is known."""
        predicted, steps = self.plan.predicted, self.plan.num_steps
        if predicted is None or steps is None:
            return ""
        hours = predicted.step_seconds * steps / 3600
        more = hours * 3600 > seconds_of(self.site.time)
        goes_on = "; it goes on in the next job by itself" if more else ""
        return f"about {hours:,.1f} h of steps, and a job takes {self.site.time} {TIME_WORDS}{goes_on}"


def submission(recipe: str, overrides: Sequence[str], asked: Asked) -> Submission:
    """Plans a new run of a recipe, or takes a run that is there; all that can be refused without Slurm is.

    Raises:
        UserError: Anything that the user can mend.
    """
    run = Path(open_run(recipe).run_folder) if is_run(recipe) else None
    profile, gpus_per_node = with_time(_site(asked.site, run), asked.time), asked.gpus_per_node
    if gpus_per_node is not None and gpus_per_node > profile.gpus_per_node:
        raise UserError(
            f"--gpus-per-node is {gpus_per_node}, and a node of {profile.name} has {profile.gpus_per_node} GPUs.",
            "Slurm would never find such a node.",
            f"ask for {profile.gpus_per_node} or fewer and for more --nodes; on nodes without GPUs leave it out."
            if profile.gpus_per_node
            else "leave it out: parallel.processes of the recipe are shared by the nodes.",
        )
    if run is None:
        per_node = gpus_per_node or profile.gpus_per_node
        return _new(recipe, overrides, profile, asked.nodes or 1, per_node, asked.force)
    return _again(run, overrides, profile, asked.nodes, gpus_per_node)


def planned_jobs(found: Submission) -> list[PlannedJob]:
    """The jobs of a run in their order: one that prepares the data where it is not, and the training.

    Raises:
        UserError: A value would break a script, or the time limit leaves no time to train.
    """
    plan, site = found.plan, found.site
    folder, topology = Path(plan.run_folder), plan.topology
    if found.lead.seconds >= seconds_of(site.time):
        raise UserError(
            f"the job takes {site.time} {TIME_WORDS}, and {found.lead.seconds} s of it are kept for saving.",
            f"{found.lead.reason}.",
            f"give --time more than {found.lead.seconds} s.",
        )
    gpus = topology.processes_per_node if topology.device == "cuda" else 0
    asked = train_request(
        site, plan.recipe.name, folder / LOGS_FOLDER, topology.num_nodes, gpus, site.time, found.lead.seconds
    )
    words = (str(folder),)
    jobs = [PlannedJob("train", asked, train_script(site, asked, programs_of(site)), words)]
    if plan.data is None:
        asked = cpu_request(site, plan.recipe.name, folder / LOGS_FOLDER, "prepare")
        script = command_script(site, asked, programs_of(site))
        jobs.insert(0, PlannedJob("prepare", asked, script, ("prepare", *words)))
    return jobs


def programs_of(site: SiteProfile) -> str | None:
    """Folder of python and accelerate on the nodes; None in a container."""
    return site.programs or (None if site.container else str(Path(sys.executable).parent))


def with_time(site: SiteProfile, time: str) -> SiteProfile:
    """The profile with another time limit, where one is asked for.

    Raises:
        UserError: It is no time, or more than the site allows.
    """
    if not time:
        return site
    if DURATION.fullmatch(time) is None:
        raise UserError(
            f"--time is {time!a}.",
            "it is the time limit of the job.",
            "write it as hours, minutes and seconds, --time 12:00:00, or with days before, --time 1-12:00:00.",
        )
    if site.longest_time and seconds_of(time) > seconds_of(site.longest_time):
        raise UserError(
            f"--time is {time}, and longest_time of {site.name} is {site.longest_time}.",
            "the site starts no longer job.",
            f"set --time to {site.longest_time} or less: a run that takes longer goes on in the next job.",
        )
    return site.model_copy(update={"time": time})


def is_run(name: str) -> bool:
    """Whether a run or a sweep is called so, or stands there."""
    return any((named_folder(name) / file).is_file() for file in (PLAN_FILE, SWEEP_FILE))


def _site(site: str, run: Path | None) -> SiteProfile:
    record = run / SITE_RECORD if run is not None else None
    if not site and record is not None and record.is_file():
        return SiteProfile.model_validate_json(record.read_text(encoding="utf-8"))
    return load_site(site or None)


def _new(
    recipe: str, overrides: Sequence[str], site: SiteProfile, nodes: int, gpus_per_node: int, force: bool
) -> Submission:
    loaded = load_recipe(recipe, overrides)
    check_single(loaded, recipe)
    on_cpus = site.gpus_per_node == 0
    here, terms = _node(site), terms_of(site)
    wanted = Wanted(loaded, DeviceRequest(None if on_cpus else nodes * gpus_per_node, nodes, on_cpus), here, None)
    worst = basis_of(loaded, None, here, terms)
    plan = draft_plan(wanted, worst, force)
    folder = run_folder_of(loaded)
    check_path(folder)
    check_free(folder)
    check_shared(site, folder)
    check_writable(folder.parent)
    check_base_model(plan)
    manifest = find_prepared(loaded)
    files: dict[str, str] = {}
    if manifest is None:
        plan = _waiting(plan, wanted, force)
    else:
        require_sizes(data_root(loaded) / manifest.content_hash, manifest)
        wanted = SearchRequest(loaded, wanted.ask, here, facts_of(loaded, manifest))
        plan = fitting_plan(wanted, basis_of(loaded, manifest, here, terms), force)
        files = {DATA_FILE: manifest.model_dump_json(indent=2) + "\n"}
    room = room_on_disk(plan, manifest.vocab_size if manifest else None)
    check_disk(plan, room)
    lead = _lead(plan, room)
    return Submission(plan, site, True, lead, _memory_words(plan, worst, on_cpus), files=files)


def _waiting(plan: RunPlan, wanted: SearchRequest, force: bool) -> RunPlan:
    """The plan of a run that waits for its data: with the recipe as it was asked for, since it is planned once more."""
    forced = (Decision(name="force", value="true", reason="--force"),) if force else ()
    return plan.model_copy(update={"recipe": wanted.recipe, "decisions": (*plan.decisions, *forced)})


def _again(
    run: Path, overrides: Sequence[str], site: SiteProfile, nodes: int | None, gpus_per_node: int | None
) -> Submission:
    before = open_run(str(run))
    now = read_status(run)
    if now is not None and now.state == "finished":
        raise UserError(
            f"{relative(run)} is finished: {now.step} of {now.num_steps} steps are done.",
            "there is nothing left to train.",
            f"see `packhorse evaluate {relative(run)}`, or train longer under another name.",
        )
    check_shared(site, run)
    topology = before.topology
    asked = (nodes or topology.num_nodes, gpus_per_node or topology.processes_per_node)
    moves = asked != (topology.num_nodes, topology.processes_per_node)
    if before.data is None and (moves or overrides):
        raise UserError(
            f"{relative(run)} waits for its data, and is planned for {topology.num_nodes} nodes.",
            "it is planned to the end when the data is prepared.",
            "leave --nodes, --gpus-per-node and overrides out, or submit the recipe under another name.",
        )
    plan = before
    if moves or overrides:
        on_cpus = topology.device == "cpu"
        ask = DeviceRequest(None if on_cpus else asked[0] * asked[1], asked[0], on_cpus) if moves else DeviceRequest()
        plan = replan(before, overrides, ask, _node(site), attempt=now.attempt if now is not None else 0)
    vocab_size = None
    if plan.data is not None:
        check_resumable(plan)
        manifest = read_data_manifest(Path(require_data(plan).folder))
        assert manifest is not None
        vocab_size = manifest.vocab_size
    room = room_on_disk(plan, vocab_size)
    check_disk(plan, room)
    words = _memory_words(plan, None, topology.device == "cpu")
    return Submission(plan, site, False, _lead(plan, room), words, is_replanned=plan != before)


def check_shared(site: SiteProfile, folder: Path) -> None:
    """Refuses a run folder that the nodes do not see, where the profile says which folders they see.

    Raises:
        UserError: It lies in none of them.
    """
    seen = [Path(expand(text)).resolve() for text in site.shared]
    if not seen or any(folder.resolve().is_relative_to(each) for each in seen):
        return
    raise UserError(
        f"{folder} lies in none of the folders that the nodes of {site.name} see: {', '.join(map(str, seen))}.",
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


def _memory_words(plan: RunPlan, worst: object, on_cpus: bool) -> str:
    if plan.predicted is not None:
        figures = f"{plan.predicted.required_bytes / GIB:.1f} of {plan.predicted.memory_bytes / GIB:.1f} GiB"
        least = "" if plan.data is not None else "at least, and looked at again when the data is prepared: "
        return f"{least}{figures} of {plan.predicted.gpu}"
    if on_cpus:
        return "not checked: the nodes have no GPUs"
    return f"not checked: {worst.reason}" if isinstance(worst, Unknown) else "not checked: gpu of the site is not set"
