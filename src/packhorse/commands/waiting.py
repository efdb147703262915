"""Runs that were submitted before their data was prepared: a job prepares it, and plans them to the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from packhorse.commands.costs import Terms, basis_of, room_on_disk
from packhorse.commands.fitting import fitting_plan
from packhorse.commands.prepared import facts_of
from packhorse.data.data_manifest import DataManifest
from packhorse.errors import UserError
from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.search.candidates import SearchRequest
from packhorse.launching.preflight import check_disk
from packhorse.launching.slurm.site import SiteProfile
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import dump_recipe
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.folder import complete_run, open_run
from packhorse.run_folder.layout import DATA_FILE, RECIPE_FILE, SITE_RECORD
from packhorse.run_folder.status import Status, write_status


def prepare_run(run: str, prepare: Callable[[Recipe], DataManifest]) -> None:
    """Prepares the data of a run, and plans the run with it where it waits for that.

    Args:
        run: Its name or folder.
        prepare: Prepares the data of a recipe, and shows so.

    Raises:
        UserError: The rows cannot be prepared, or the run does not fit its GPUs; a run that waits has then failed.
    """
    plan = open_run(run)
    try:
        manifest = prepare(plan.recipe)
        if plan.data is None:
            _complete(plan, manifest)
    except UserError as error:
        if plan.data is None:
            said = f"it could not be prepared: {str(error).splitlines()[0]}"
            write_status(Path(plan.run_folder), Status(state="failed", step=0, num_steps=0, attempt=0, message=said))
        raise


def _complete(plan: RunPlan, manifest: DataManifest) -> None:
    """The plan anew, for the same nodes and GPUs, with as many steps as the packs make."""
    topology, recipe = plan.topology, plan.recipe
    on_cpus = topology.device == "cpu"
    ask = DeviceRequest(None if on_cpus else topology.world_size, topology.num_nodes, on_cpus)
    here = Hardware(num_cores=topology.threads_per_process * topology.processes_per_node, gpus=())
    facts = facts_of(recipe, manifest)
    record = Path(plan.run_folder) / SITE_RECORD
    site = SiteProfile.model_validate_json(record.read_text(encoding="utf-8")) if record.is_file() else None
    made = fitting_plan(
        SearchRequest(recipe, ask, here, facts), basis_of(recipe, manifest, here, terms_of(site)), is_forced(plan)
    )
    made = made.model_copy(update={"run_folder": plan.run_folder, "base_model": plan.base_model})
    check_disk(made, room_on_disk(made, manifest.vocab_size))
    complete_run(made, {RECIPE_FILE: dump_recipe(made.recipe), DATA_FILE: manifest.model_dump_json(indent=2) + "\n"})


def terms_of(site: SiteProfile | None) -> Terms:
    """What a site profile says of its GPUs.

    Raises:
        UserError: No GPU is called so.
    """
    if site is None or site.gpu is None or site.gpus_per_node == 0:
        return Terms()
    return Terms(find_gpu(site.gpu), site.network_gbit)


def is_forced(plan: RunPlan) -> bool:
    """Whether the run was submitted with `--force`."""
    return any(decision.name == "force" for decision in plan.decisions)
