"""The prepared data of a recipe or a run: its facts for a plan, and whether it is still complete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from packhorse.data.content_key import SOURCE_LISTS, content_key, find_prepared, source_hash
from packhorse.data.data_manifest import DataManifest, read_data_manifest, require_sizes
from packhorse.data.packs.batches import BatchPlan, units_of_steps
from packhorse.data.packs.store import open_store
from packhorse.data.resolve import data_root, source_name
from packhorse.errors import UserError
from packhorse.plan.run_plan import DataFacts, RunPlan
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.folder import relative
from packhorse.run_folder.jobs import require_prepared_data
from packhorse.run_folder.layout import DATA_FILE, RECIPE_FILE


def manifest_if_prepared(recipe: Recipe) -> DataManifest | None:
    """Return the manifest of the prepared data; None if there is none, or its rows are not on this machine."""
    if not data_root(recipe).is_dir():
        return None
    try:
        return find_prepared(recipe)
    except UserError:
        return None


def facts_of(recipe: Recipe, manifest: DataManifest) -> DataFacts:
    """Return what a plan records about the prepared data of a recipe."""
    folder = data_root(recipe) / manifest.content_hash
    if manifest.documents_per_row == 1:
        return data_facts(folder, manifest)
    store = open_store(folder, "train")
    batches = BatchPlan(store.pack_costs, recipe.batch.packs, recipe.seed, store.in_order)
    units = units_of_steps(batches, store.pack_units)
    return data_facts(folder, manifest).model_copy(update={"units_per_step": units})


def data_facts(folder: Path, manifest: DataManifest) -> DataFacts:
    """Return what a plan records about prepared data in a given folder, whatever a step takes of it."""
    split = manifest.splits["train"]
    return DataFacts(
        folder=str(folder.absolute()),
        content_hash=manifest.content_hash,
        tokenizer=manifest.tokenizer,
        num_rows=split.num_rows,
        num_packs=split.num_packs,
        num_tokens=split.num_tokens,
        num_supervised_tokens=split.num_supervised_tokens,
        fill=split.fill,
    )


def require_data(plan: RunPlan) -> DataFacts:
    """Return the prepared data of a run, with every file of the recorded size.

    Raises:
        UserError: The data is not prepared yet or gone, or a file is missing or has another size.
    """
    require_manifest(plan)
    assert plan.data is not None
    return plan.data


def require_manifest(plan: RunPlan) -> DataManifest:
    """Return the manifest of a run's prepared data, with every file of the recorded size.

    Raises:
        UserError: The data is not prepared yet or gone, or a file is missing or has another size.
    """
    require_prepared_data(plan)
    assert plan.data is not None
    manifest = read_data_manifest(Path(plan.data.folder))
    if manifest is not None:
        require_sizes(Path(plan.data.folder), manifest)
        return manifest
    require_same_rows(plan)
    raise UserError(
        f"the prepared data of this run, {plan.data.folder}, is gone.",
        "packs and held-out rows are read from that folder.",
        f"prepare it again: packhorse prepare {relative(plan.run_folder)}",
    )


def require_same_rows(plan: RunPlan) -> None:
    """Refuse to prepare the data of a run again from other rows than it was started with.

    Raises:
        UserError: A source, the tokenizer or the template has changed, or is missing.
    """
    assert plan.data is not None
    recipe, key = plan.recipe, content_key(plan.recipe)
    if key == plan.data.content_hash:
        return
    folder = Path(plan.run_folder)
    changed = ", ".join(_changed_sources(recipe, folder / DATA_FILE)) or "the tokenizer, the template or this version"
    name = relative(folder)
    raise UserError(
        f"{name} began with the data {plan.data.content_hash}, and its recipe now gives {key}; changed: {changed}.",
        "a run resumes with the rows that it began with, and its prepared data is gone.",
        f"restore the earlier file and run `packhorse prepare {name}`; or train on the rows of today as a new run: "
        f"`packhorse train {name}/{RECIPE_FILE} name={recipe.name}-2`.",
    )


def _changed_sources(recipe: Recipe, record: Path) -> Iterator[str]:
    """Yield the sources whose content is not what the run's copy of data.json records."""
    if not record.is_file():
        return
    before = {each.path: each.sha256 for each in DataManifest.model_validate_json(record.read_bytes()).sources}
    for source in (source for name in SOURCE_LISTS for source in getattr(recipe.data, name)):
        name = source_name(source)
        if before.get(name, "") != source_hash(source, recipe):
            yield name
