"""What an estimate is based on: the requested or present GPUs, the shape of the model, the packs on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from packhorse.data.data_manifest import DataManifest
from packhorse.data.packs.store import open_store
from packhorse.data.resolve import data_root
from packhorse.estimate.checkpoint_size import CheckpointSpace, checkpoint_space
from packhorse.estimate.gpus import GpuProfile, gpu_of_device
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.objectives import DistilObjective
from packhorse.recipe.schema import Recipe
from packhorse.recipe.teacher import teacher_recipe
from packhorse.workflows.model_shape import Unknown, known_shape

GBIT_TO_GB = 1 / 8


@dataclass(frozen=True)
class GpuTerms:
    """What the user states about the GPUs, apart from their number.

    Attributes:
        gpu: Kind of GPU; None means the GPUs of this machine.
        network_gbit: Gbit/s per GPU between nodes.
        price: Price of one GPU hour.
    """

    gpu: GpuProfile | None = None
    network_gbit: float | None = None
    price: float | None = None


def basis_of(
    recipe: Recipe, manifest: DataManifest | None, here: Hardware, terms: GpuTerms
) -> EstimateInputs | Unknown:
    """Return what is known about model, packs and GPU, or what is missing.

    Args:
        recipe: Recipe with a model, a method and a pack length.
        manifest: Manifest of the prepared data; None assumes the worst that the pack length allows.
        here: This machine.
        terms: Statements of the user about the GPUs.

    Raises:
        UserError: A GPU profile of the user is wrong, a data file has changed, or training refuses the model or the
            method on it.
    """
    gpu = terms.gpu or _gpu_here(here)
    if isinstance(gpu, Unknown):
        return gpu
    shape = known_shape(recipe, manifest.vocab_size if manifest is not None else None)
    if isinstance(shape, Unknown):
        return shape
    packs, validation = PackFigures.full(recipe.batch.length), None
    if manifest is not None:
        folder = data_root(recipe) / manifest.content_hash
        packs = _figures(folder, "train", recipe)
        split = manifest.splits.get("validation")
        if split is not None and split.num_packs:
            validation = _figures(folder, "validation", recipe)
    network = None if terms.network_gbit is None else terms.network_gbit * GBIT_TO_GB
    host = here.host_bytes if _gpu_here(here) == gpu else None
    teacher = _teacher_shape(recipe)
    if isinstance(teacher, Unknown):
        return teacher
    return EstimateInputs(shape, packs, gpu, validation, network, terms.price, host_bytes=host, teacher=teacher)


def _teacher_shape(recipe: Recipe) -> Shape | Unknown | None:
    if not isinstance(recipe.objective, DistilObjective):
        return None
    shape = known_shape(teacher_recipe(recipe), None)
    return Unknown(f"objective.teacher: {shape.reason}") if isinstance(shape, Unknown) else shape


def on_known_gpus(ask: DeviceRequest, here: Hardware, terms: GpuTerms) -> DeviceRequest:
    """Return the request with the compute capability of the GPUs, if their kind is known."""
    gpu = terms.gpu or _gpu_here(here)
    return ask if isinstance(gpu, Unknown) else replace(ask, capability=gpu.compute_capability)


def room_on_disk(plan: RunPlan, vocab_size: int | None) -> CheckpointSpace | None:
    """Return the disk space of a run's checkpoints; None if the weights cannot be counted before loading.

    Args:
        plan: Plan of the run.
        vocab_size: Size of the tokenizer; a fresh model takes it.
    """
    shape = known_shape(plan.recipe, vocab_size)
    return None if isinstance(shape, Unknown) else checkpoint_space(plan, shape)


def with_guess(basis: EstimateInputs, recipe: Recipe) -> EstimateInputs:
    """Return the basis with the number of packs guessed from the first rows, if the number of steps depends on it."""
    if basis.packs.is_measured or recipe.steps is not None:
        return basis
    # Only here: resuming a run needs neither tokenizers nor pyarrow in this process.
    from packhorse.data.estimate_packs import estimate_packs

    return replace(basis, guessed=estimate_packs(recipe))


def _gpu_here(here: Hardware) -> GpuProfile | Unknown:
    if not here.gpus:
        return Unknown("which GPU is not known: name it, for example --gpus 8xH100-80GB")
    names = sorted(set(here.gpus))
    if len(names) > 1:
        return Unknown(f"this machine has different GPUs ({', '.join(names)}): name one kind as --gpus 2xNAME")
    gpu = gpu_of_device(names[0])
    if gpu is None:
        return Unknown(f"{names[0]} is not in the list of known GPUs: describe it in ./gpus.yaml (docs/speed.md)")
    return gpu


def _figures(folder: Path, split: str, recipe: Recipe) -> PackFigures:
    store = open_store(folder, split)
    return PackFigures.of_store(recipe.batch.length, store.pack_figures, store.documents, store.pack_offsets)
