"""`packhorse train`: refuse early, prepare once, run, say how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from packhorse.commands.costs import Terms, basis_of, room_on_disk
from packhorse.commands.fitting import draft_plan, fitting_plan
from packhorse.commands.inquiry import read_gpus
from packhorse.commands.lines import shown
from packhorse.commands.parameters import Unknown
from packhorse.commands.prepared import facts_of, require_data
from packhorse.data.content_key import find_prepared
from packhorse.data.data_manifest import DataManifest, read_data_manifest, require_sizes
from packhorse.data.resolve import data_root
from packhorse.errors import EXIT_OK, EXIT_STOPPED, UserError
from packhorse.estimate.search.candidates import SearchRequest
from packhorse.launching.local.recovery import run_to_end
from packhorse.launching.local.stop_signals import StoppedBeforeStart, stop_signals
from packhorse.launching.preflight import check_base_model, check_disk, check_nvme, check_resumable, check_writable
from packhorse.plan.command import job_argv
from packhorse.plan.make_plan import run_folder_of
from packhorse.plan.replan import replace_plan, replan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware, check_machine, detect_hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import check_single
from packhorse.run_folder.folder import check_free, create_run, open_run, relative
from packhorse.run_folder.layout import DATA_FILE, PLAN_FILE
from packhorse.run_folder.lock import launcher_lock
from packhorse.run_folder.status import read_status


def train(
    recipe: str,
    overrides: Sequence[str],
    gpus: int | None,
    resume: bool,
    restarts: int | None = None,
    force: bool = False,
) -> int:
    """Prepares the data where it is not there, then trains; or goes on with a run.

    Raises:
        UserError: Anything that the user can mend, before a device is taken.
    """
    console, errors = Console(), Console(stderr=True)

    def say(line: str) -> None:
        errors.print(line, markup=False, highlight=False, soft_wrap=True)

    with stop_signals() as stop:
        try:
            made = (
                _resumed(recipe, overrides, gpus, force)
                if resume
                else _new_run(recipe, overrides, DeviceRequest(gpus), Terms(), console, local=True, force=force)
            )
        except StoppedBeforeStart:
            say("stopped before training; nothing is half-written: the same command starts again")
            return EXIT_STOPPED
        stop.ranks_may_run()
        with launcher_lock(Path(made.run_folder)):
            if resume and made != open_run(recipe):
                kept = replace_plan(made)
                say(f"another plan {made.decisions[-1].reason}; the earlier one is kept as {relative(kept)}")
            console.print(f"running {shown(made.argv)}", soft_wrap=True, highlight=False, style="dim")
            outcome = run_to_end(made, made.recipe.recovery.restarts if restarts is None else restarts, stop, say)
    if outcome.message:
        say(outcome.message)
    if outcome.exit_code == EXIT_OK:
        folder = relative(made.run_folder)
        console.print(f"done: {folder}; next: packhorse evaluate {folder}", soft_wrap=True, highlight=False)
    return outcome.exit_code


def write_run(recipe: str, overrides: Sequence[str], gpus: str, nodes: int | None, force: bool = False) -> int:
    """Makes the run folder, with the data prepared, for a launch elsewhere; starts nothing."""
    console = Console()
    ask, terms = read_gpus(gpus, nodes)
    made = _new_run(recipe, overrides, ask, terms, console, local=False, force=force)
    what = shown(job_argv(made) or made.argv)
    console.print(f"planned {relative(made.run_folder)}: {what}", soft_wrap=True, highlight=False)
    return EXIT_OK


def _new_run(
    recipe: str,
    overrides: Sequence[str],
    ask: DeviceRequest,
    terms: Terms,
    console: Console,
    *,
    local: bool,
    force: bool,
) -> RunPlan:
    if (Path(recipe) / PLAN_FILE).is_file():
        raise UserError(
            f"{recipe} is a run, not a recipe.",
            "a new run is made from a recipe.",
            f"go on with it: packhorse resume {recipe}.",
        )
    loaded = load_recipe(recipe, overrides)
    check_single(loaded, recipe)
    here = detect_hardware()
    wanted = SearchRequest(loaded, ask, here, None)
    draft = draft_plan(wanted, basis_of(loaded, None, here, terms), force)
    # All that can be refused without reading a row is refused before the rows are read.
    if local:
        check_machine(draft.topology, here)
    check_free(run_folder_of(loaded))
    check_writable(Path(draft.run_folder).parent)
    check_base_model(draft)
    if local:
        check_nvme(draft)
    manifest = find_prepared(loaded)
    if manifest is None:
        # Only here: a warm start needs neither tokenizers nor torch in this process.
        from packhorse.commands.data import prepare_with_progress

        manifest = prepare_with_progress(loaded, console).manifest
    require_sizes(data_root(loaded) / manifest.content_hash, manifest)
    facts = facts_of(loaded, manifest)
    made = fitting_plan(replace(wanted, data=facts), basis_of(loaded, manifest, here, terms), force)
    check_disk(made, room_on_disk(made, manifest.vocab_size))
    create_run(made, {DATA_FILE: manifest.model_dump_json(indent=2) + "\n"})
    return made


def _resumed(run: str, overrides: Sequence[str], gpus: int | None, force: bool) -> RunPlan:
    before = made = open_run(run)
    now = read_status(Path(made.run_folder))
    if now is not None and now.state == "finished":
        raise UserError(
            f"{relative(made.run_folder)} is finished: {now.step} of {now.num_steps} steps are done.",
            "there is nothing left to train.",
            f"see `packhorse evaluate {relative(made.run_folder)}`, or train longer under another name.",
        )
    here = detect_hardware()
    made = replan(made, overrides, DeviceRequest(gpus), here, attempt=now.attempt if now is not None else 0)
    check_resumable(made)
    check_machine(made.topology, here)
    manifest = read_data_manifest(Path(require_data(made).folder))
    assert manifest is not None
    check_disk(made, room_on_disk(made, manifest.vocab_size))
    return made if made == before else _still_fitting(made, manifest, here, force)


def _still_fitting(made: RunPlan, manifest: DataManifest, here: Hardware, force: bool) -> RunPlan:
    """Another plan of a run, which its GPUs must hold as a new one's."""
    basis = basis_of(made.recipe, manifest, here, Terms())
    if isinstance(basis, Unknown) or made.topology.device == "cpu":
        return made
    topology = made.topology
    if not force:
        ask = DeviceRequest(topology.world_size, topology.num_nodes)
        check_memory(Wanted(made.recipe, ask, here, made.data), Case(made, basis))
    return Case(made, basis).noted()
