"""`packhorse train`: refuse early, prepare once, run, say how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from packhorse.commands.plan import data_facts, require_data, shown
from packhorse.data.identity import find_prepared
from packhorse.data.places import data_root
from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.local import launch
from packhorse.launching.lock import only_launcher
from packhorse.launching.preflight import check_base_model, check_nvme, check_resumable, check_writable
from packhorse.launching.run_folder import check_free, create_run, open_run, relative
from packhorse.plan.hardware import detect_hardware
from packhorse.plan.make import make_plan, run_folder_of
from packhorse.plan.run_plan import PLAN_FILE, RunPlan
from packhorse.plan.topology import Ask, check_machine
from packhorse.recipe.load import load_recipe
from packhorse.record.status import read_status


def train(recipe: str, overrides: Sequence[str], gpus: int | None, resume: bool) -> int:
    """Prepares the data where it is not there, then trains; or goes on with a run.

    Raises:
        UserError: Anything that the user can mend, before a device is taken.
    """
    console = Console()
    made = _resumed(recipe, overrides, gpus) if resume else _new_run(recipe, overrides, Ask(gpus), console, local=True)
    with only_launcher(Path(made.run_folder)):
        console.print(f"running {shown(made.argv)}", soft_wrap=True, highlight=False, style="dim")
        outcome = launch(made)
    if outcome.message:
        Console(stderr=True).print(outcome.message, markup=False, highlight=False, soft_wrap=True)
    if outcome.exit_code == EXIT_OK:
        folder = relative(made.run_folder)
        console.print(f"done: {folder}; next: packhorse evaluate {folder}", soft_wrap=True, highlight=False)
    return outcome.exit_code


def write_run(recipe: str, overrides: Sequence[str], gpus: int | None, nodes: int | None) -> int:
    """Makes the run folder, with the data prepared, for a launch elsewhere; starts nothing."""
    console = Console()
    made = _new_run(recipe, overrides, Ask(gpus, nodes), console, local=False)
    console.print(f"planned {relative(made.run_folder)}: {shown(made.argv)}", soft_wrap=True, highlight=False)
    return EXIT_OK


def _new_run(recipe: str, overrides: Sequence[str], ask: Ask, console: Console, *, local: bool) -> RunPlan:
    if (Path(recipe) / PLAN_FILE).is_file():
        raise UserError(
            f"{recipe} is a run, not a recipe.",
            "a new run is made from a recipe.",
            f"go on with it: packhorse train {recipe} --resume.",
        )
    loaded = load_recipe(recipe, overrides)
    here = detect_hardware()
    draft = make_plan(loaded, ask, here, None)
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
    made = make_plan(loaded, ask, here, data_facts(data_root(loaded) / manifest.content_hash, manifest))
    create_run(made, {"data.json": manifest.model_dump_json(indent=2) + "\n"})
    return made


def _resumed(run: str, overrides: Sequence[str], gpus: int | None) -> RunPlan:
    made = open_run(run)
    if overrides or gpus:
        raise UserError(
            f"--resume came with {' '.join(overrides) or f'--gpus {gpus}'}.",
            "a run goes on as it was planned; another setting is another run.",
            f"leave it out, or train the recipe under another name than {made.recipe.name}.",
        )
    now = read_status(Path(made.run_folder))
    if now is not None and now.state == "finished":
        raise UserError(
            f"{relative(made.run_folder)} is finished: {now.step} of {now.num_steps} steps are done.",
            "there is nothing left to train.",
            f"see `packhorse evaluate {relative(made.run_folder)}`, or train longer under another name.",
        )
    check_resumable(made)
    check_machine(made.topology, detect_hardware())
    require_data(made)
    return made
