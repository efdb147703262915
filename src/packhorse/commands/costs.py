"""What an estimate is made on: the GPUs that were named or are here, the model's shape, the packs on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from packhorse.commands.parameters import Unknown, known_shape
from packhorse.data.data_manifest import DataManifest
from packhorse.data.packs.store import open_store
from packhorse.data.resolve import data_root
from packhorse.estimate.checkpoint_size import CheckpointSpace, checkpoint_space
from packhorse.estimate.gpus import GpuProfile, gpu_of_device
from packhorse.estimate.packs import PackFigures
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import Hardware
from packhorse.recipe.schema import Recipe

GBIT_TO_GB = 1 / 8


@dataclass(frozen=True)
class Terms:
    """What the user says of the GPUs beside their number.

    Attributes:
        gpu: Of which kind; None: those of this machine.
        network_gbit: Gbit/s of one GPU between nodes.
        price: Of a GPU hour.
    """

    gpu: GpuProfile | None = None
    network_gbit: float | None = None
    price: float | None = None


def basis_of(recipe: Recipe, manifest: DataManifest | None, here: Hardware, terms: Terms) -> EstimateInputs | Unknown:
    """What is known of model, packs and GPU, or what is not.

    Args:
        recipe: Its model, method and length.
        manifest: Of the prepared data; None takes the worst that the length allows.
        here: This machine.
        terms: Of the command line.

    Raises:
        UserError: The user's own GPU profiles are wrong, a file of the data is not what was written, or the model or
            the method on it is one that training refuses.
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
    return EstimateInputs(shape, packs, gpu, validation, network, terms.price, host_bytes=host)


def room_on_disk(made: RunPlan, vocab_size: int | None) -> CheckpointSpace | None:
    """What the checkpoints of a run take; None where the model's weights cannot be counted ahead.

    Args:
        made: The run.
        vocab_size: Size of the tokenizer, which a fresh model takes.
    """
    shape = known_shape(made.recipe, vocab_size)
    return None if isinstance(shape, Unknown) else checkpoint_space(made, shape)


def with_guess(basis: EstimateInputs, recipe: Recipe) -> EstimateInputs:
    """The number of packs guessed from the first rows, where the steps hang on it."""
    if basis.packs.is_measured or recipe.steps is not None:
        return basis
    # Only here: a run that goes on needs neither tokenizers nor pyarrow in this process.
    from packhorse.data.estimate_packs import estimate_packs

    guess = estimate_packs(recipe)
    return basis if guess is None else replace(basis, guessed=Guessed(guess.num_packs, guess.reason))


def _gpu_here(here: Hardware) -> GpuProfile | Unknown:
    """The card of this machine; where they differ, nothing is said of them."""
    if not here.gpus:
        return Unknown("which GPU is not known: --gpus 8xH100-80GB says it")
    names = sorted(set(here.gpus))
    if len(names) > 1:
        return Unknown(f"this machine has different GPUs ({', '.join(names)}): --gpus 2xNAME says for which to plan")
    found = gpu_of_device(names[0])
    if found is None:
        return Unknown(f"{names[0]} is not among the GPUs that are known: describe it in ./gpus.yaml (docs/speed.md)")
    return found


def _figures(folder: Path, split: str, recipe: Recipe) -> PackFigures:
    store = open_store(folder, split)
    return PackFigures.of_store(recipe.batch.length, store.pack_figures, store.documents)
