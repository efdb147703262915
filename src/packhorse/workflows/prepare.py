"""Prepare the data of a recipe, or of a run that was submitted before its data was prepared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from packhorse.data.data_manifest import DataManifest, read_data_manifest
from packhorse.errors import UserError
from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.search.candidates import SearchRequest
from packhorse.launching.preflight import check_disk, check_teacher_disk
from packhorse.launching.slurm.site import SiteProfile
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import dump_recipe
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.folder import complete_run, open_run
from packhorse.run_folder.layout import DATA_FILE, RECIPE_FILE, SITE_RECORD
from packhorse.run_folder.status import Status, write_status
from packhorse.workflows.plan_basis import GpuTerms, basis_of, on_known_gpus, room_on_disk
from packhorse.workflows.plan_request import fitting_plan
from packhorse.workflows.prepared_data import facts_of, require_same_rows

if TYPE_CHECKING:
    from packhorse.data.prepare import PreparedData


Prepare = Callable[[Recipe], DataManifest]
"""Prepares the data of a recipe; callers choose how its progress is shown."""


def prepare_data(recipe: Recipe, progress: Callable[[int], None] | None = None) -> PreparedData:
    """Tokenize and pack the rows of a recipe, if that has not been done.

    Args:
        recipe: Recipe with data sources.
        progress: Called with the number of rows done.

    Raises:
        UserError: Rows are wrong, or files are missing.
    """
    # Only here: starting a run whose data is prepared needs neither tokenizers nor torch in this process.
    from packhorse.data.prepare import prepare

    return prepare(recipe, progress)


def manifest_of_prepared(recipe: Recipe) -> DataManifest:
    """Prepare the data of a recipe without showing progress; return its manifest."""
    return prepare_data(recipe).manifest


def prepare_run(run: str, prepare: Prepare = manifest_of_prepared) -> None:
    """Prepare the data of a run, and complete its plan if it waits for the data.

    Args:
        run: Name or folder of the run.
        prepare: Prepares the data of a recipe.

    Raises:
        UserError: The rows cannot be prepared, or the run does not fit its GPUs; a waiting run is then marked failed.
            Or the rows are not those that the run began with.
    """
    plan = open_run(run)
    if plan.data is not None and read_data_manifest(Path(plan.data.folder)) is None:
        require_same_rows(plan)
    try:
        manifest = prepare(plan.recipe)
        if plan.data is None:
            _complete(plan, manifest)
    except UserError as error:
        if plan.data is None:
            message = f"its data could not be prepared: {str(error).splitlines()[0]}"
            failed = Status(state="failed", step=0, num_steps=0, attempt=0, message=message)
            write_status(Path(plan.run_folder), failed)
        raise


def _complete(waiting: RunPlan, manifest: DataManifest) -> None:
    """Plan again for the same nodes and GPUs, now with the number of packs."""
    topology, recipe = waiting.topology, waiting.recipe
    on_cpus = topology.device == "cpu"
    ask = DeviceRequest(None if on_cpus else topology.world_size, topology.num_nodes, on_cpus)
    node = Hardware(num_cores=topology.threads_per_process * topology.processes_per_node, gpus=())
    record = Path(waiting.run_folder) / SITE_RECORD
    site = SiteProfile.model_validate_json(record.read_text(encoding="utf-8")) if record.is_file() else None
    wanted = SearchRequest(recipe, on_known_gpus(ask, node, site_terms(site)), node, facts_of(recipe, manifest))
    plan = fitting_plan(wanted, basis_of(recipe, manifest, node, site_terms(site)), is_forced(waiting))
    kept = {"run_folder": waiting.run_folder, "base_model": waiting.base_model, "teacher": waiting.teacher}
    plan = plan.model_copy(update=kept)
    room = room_on_disk(plan, manifest.vocab_size)
    check_disk(plan, room)
    check_teacher_disk(plan, room)
    complete_run(plan, {RECIPE_FILE: dump_recipe(plan.recipe), DATA_FILE: manifest.model_dump_json(indent=2) + "\n"})


def site_terms(site: SiteProfile | None) -> GpuTerms:
    """Return what a site profile states about its GPUs.

    Raises:
        UserError: The profile names an unknown GPU.
    """
    if site is None or site.gpu is None or site.gpus_per_node == 0:
        return GpuTerms()
    return GpuTerms(find_gpu(site.gpu), site.network_gbit)


def is_forced(plan: RunPlan) -> bool:
    """Return whether the run was submitted with `--force`."""
    return any(decision.name == "force" for decision in plan.decisions)
