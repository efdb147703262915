"""A new run: recipe, machine and data become a run folder or a refusal; and the launch of a run on this machine."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packhorse.data.content_key import find_prepared
from packhorse.data.data_manifest import DataManifest, require_sizes
from packhorse.data.resolve import data_root
from packhorse.errors import EXIT_STOPPED, UserError
from packhorse.estimate.checkpoint_size import CheckpointSpace
from packhorse.estimate.plan_estimate import EstimateInputs
from packhorse.estimate.search.candidates import SearchRequest
from packhorse.launching.local.recovery import run_to_end
from packhorse.launching.local.stop_signals import StoppedBeforeStart, stop_signals
from packhorse.launching.preflight import (
    check_base_model,
    check_compiler,
    check_disk,
    check_nvme,
    check_teacher_disk,
    check_teacher_folder,
    check_writable,
)
from packhorse.library_hooks import check_library_hooks
from packhorse.plan.replan import replace_plan
from packhorse.plan.run_plan import Decision, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware, check_machine, detect_hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Recipe
from packhorse.recipe.sweep import check_single
from packhorse.run_folder.folder import check_free, create_run, relative
from packhorse.run_folder.layout import DATA_FILE, PLAN_FILE
from packhorse.run_folder.lock import launcher_lock
from packhorse.workflows.early_checks import check_start
from packhorse.workflows.model_shape import Unknown
from packhorse.workflows.plan_basis import GpuTerms, basis_of, on_known_gpus, room_on_disk
from packhorse.workflows.plan_request import draft_plan, fitting_plan, read_gpus
from packhorse.workflows.prepare import Prepare, manifest_of_prepared
from packhorse.workflows.prepared_data import facts_of
from packhorse.workflows.template_clock import refuse_clock


@dataclass(frozen=True)
class Machine:
    """Where a new run will run.

    Attributes:
        ask: Requested GPUs and nodes.
        node: Hardware of one node.
        terms: Kind and network of the GPUs.
        checks: Checks of a draft plan that belong to this machine; each raises UserError.
    """

    ask: DeviceRequest
    node: Hardware
    terms: GpuTerms
    checks: Sequence[Callable[[RunPlan], None]] = ()


@dataclass(frozen=True)
class NewRun:
    """A run that may be created.

    Attributes:
        plan: Plan of the run; without data if a job prepares the data first.
        manifest: Manifest of the prepared data; None if a job prepares the data first.
        room: Disk space of its checkpoints, if known.
        basis: What the memory estimate of the draft was based on.
    """

    plan: RunPlan
    manifest: DataManifest | None
    room: CheckpointSpace | None
    basis: EstimateInputs | Unknown

    @property
    def files(self) -> dict[str, str]:
        """Files of the run folder, apart from plan and recipe."""
        return {} if self.manifest is None else {DATA_FILE: self.manifest.model_dump_json(indent=2) + "\n"}


@dataclass(frozen=True)
class Reporter:
    """Where a workflow reports; silent by default.

    Attributes:
        info: Takes a line about what happens.
        warn: Takes a line about a failure, a restart or a stop.
    """

    info: Callable[[str], None] = lambda line: None
    warn: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class RunEnd:
    """How a run on this machine ended.

    Attributes:
        plan: Plan of the run; None if it was stopped before there was one.
        exit_code: One of `packhorse.errors`.
        message: What happened; empty if the run made all its steps.
    """

    plan: RunPlan | None
    exit_code: int
    message: str = ""


def load_single(recipe: str, overrides: Sequence[str]) -> Recipe:
    """Load a recipe for one new run.

    Raises:
        UserError: The recipe has mistakes, is a sweep, or is not a recipe but a run.
    """
    if (Path(recipe) / PLAN_FILE).is_file():
        raise UserError(
            f"{recipe} is a run, not a recipe.",
            "a new run is made from a recipe.",
            f"resume the run: packhorse resume {recipe}.",
        )
    loaded = load_recipe(recipe, overrides)
    check_single(loaded, recipe)
    return loaded


def plan_new_run(recipe: Recipe, machine: Machine, prepare: Prepare | None, force: bool = False) -> NewRun:
    """Return a run of a recipe on a machine. Writes nothing but prepared data.

    Args:
        recipe: Recipe of one run.
        machine: Where the run will run.
        prepare: Prepares the data if it is not prepared; None leaves that to a job.
        force: Whether to plan even if the GPUs cannot hold the run.

    Raises:
        UserError: The run cannot start. What can be known without reading a row is refused before the rows are read.
    """
    check_start(recipe)
    ask = on_known_gpus(machine.ask, machine.node, machine.terms)
    wanted = SearchRequest(recipe, ask, machine.node, None)
    worst = basis_of(recipe, None, machine.node, machine.terms)
    draft = draft_plan(wanted, worst, force)
    folder = Path(draft.run_folder)
    for check in machine.checks:
        check(draft)
    check_free(folder)
    check_writable(folder.parent)
    check_base_model(draft)
    check_teacher_folder(draft)
    manifest = find_prepared(recipe)
    if manifest is None and prepare is not None:
        manifest = prepare(recipe)
    elif manifest is None:
        refuse_clock(recipe)
    if manifest is None:
        plan = _waiting(draft, recipe, force)
    else:
        require_sizes(data_root(recipe) / manifest.content_hash, manifest)
        basis = basis_of(recipe, manifest, machine.node, machine.terms)
        plan = fitting_plan(replace(wanted, data=facts_of(recipe, manifest)), basis, force)
    room = room_on_disk(plan, manifest.vocab_size if manifest is not None else None)
    check_disk(plan, room)
    check_teacher_disk(plan, room)
    return NewRun(plan, manifest, room, worst)


def _waiting(draft: RunPlan, recipe: Recipe, force: bool) -> RunPlan:
    """Return the plan of a run that waits for its data. It keeps the original recipe, because it is planned again."""
    forced = (Decision(name="force", value="true", reason="--force"),) if force else ()
    return draft.model_copy(update={"recipe": recipe, "decisions": (*draft.decisions, *forced)})


def create_run_here(
    recipe: Recipe,
    gpus: int | None = None,
    force: bool = False,
    prepare: Prepare = manifest_of_prepared,
    is_trial: bool = False,
) -> RunPlan:
    """Create the run folder of a recipe that is to run on this machine; return its plan.

    Raises:
        UserError: The run cannot start on this machine.
    """
    here = detect_hardware()
    checks = (lambda draft: check_machine(draft.topology, here), check_nvme, check_compiler)
    machine = Machine(DeviceRequest(gpus), here, GpuTerms(), checks)
    run = plan_new_run(recipe, machine, prepare, force)
    return _created(replace(run, plan=run.plan.model_copy(update={"is_trial": is_trial})))


def write_run(
    recipe: str,
    overrides: Sequence[str],
    gpus: str | None,
    nodes: int | None,
    force: bool = False,
    prepare: Prepare = manifest_of_prepared,
) -> RunPlan:
    """Create a run folder with prepared data, for a launch elsewhere; return its plan. Starts nothing.

    Raises:
        UserError: The run cannot be planned.
    """
    ask, terms = read_gpus(gpus or "", nodes)
    loaded = load_single(recipe, overrides)
    return _created(plan_new_run(loaded, Machine(ask, detect_hardware(), terms), prepare, force))


def _created(run: NewRun) -> RunPlan:
    create_run(run.plan, run.files)
    return run.plan


def train(
    recipe: Recipe,
    gpus: int | None = None,
    restarts: int | None = None,
    force: bool = False,
    prepare: Prepare = manifest_of_prepared,
    reporter: Reporter = Reporter(),
) -> RunEnd:
    """Create a run of a recipe and train it on this machine.

    Args:
        recipe: Recipe of one run.
        gpus: Number of processes, one per GPU; None takes the recipe's, or those of the machine.
        restarts: Attempts that may follow a failed one; None takes the recipe's.
        force: Whether to run even if the GPUs cannot hold the plan.
        prepare: Prepares the data if it is not prepared.
        reporter: Where progress is reported.

    Raises:
        UserError: The run cannot start; no device has been taken.
    """
    return launch_here(lambda: create_run_here(recipe, gpus, force, prepare), None, restarts, reporter)


def launch_here(
    make_plan: Callable[[], RunPlan], before: RunPlan | None, restarts: int | None, reporter: Reporter
) -> RunEnd:
    """Make the plan of a run, then run it on this machine until it ends; a stop signal ends both cleanly.

    Args:
        make_plan: Returns the plan of a run whose folder exists.
        before: Plan in the run folder, if the run is resumed.
        restarts: Attempts that may follow a failed one; None takes the recipe's.
        reporter: Where progress is reported.

    Raises:
        UserError: An installed library lacks a name that Packhorse uses, or the plan cannot be made.
    """
    check_library_hooks()
    with stop_signals() as stop:
        try:
            plan = make_plan()
        except StoppedBeforeStart:
            message = "stopped before training; nothing is half-written, the same command starts again"
            return RunEnd(None, EXIT_STOPPED, message)
        stop.ranks_may_run()
        with launcher_lock(Path(plan.run_folder)):
            if before is not None and plan != before:
                kept = replace_plan(plan)
                reporter.warn(f"the plan changed {plan.decisions[-1].reason}; the earlier plan is in {relative(kept)}")
            reporter.info(f"running {shlex.join(map(relative, plan.argv))}")
            outcome = run_to_end(
                plan, plan.recipe.recovery.restarts if restarts is None else restarts, stop, reporter.warn
            )
    return RunEnd(plan, outcome.exit_code, outcome.message)
