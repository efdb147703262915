"""Log-probabilities under the reference model, from a pass before training by the code that trains.

The model before step 1 is the reference, or another model that is loaded first and freed again: there is never a second
model in memory, and both sides of a log-ratio have the same precision, kernel and rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from packhorse.data.packs.store import PackStore
from packhorse.errors import UserError
from packhorse.model.load import ModelRequest, weight_files
from packhorse.model.sequence import SequenceGroup
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.objectives import ReferenceSection
from packhorse.run_folder.checkpoints.manifest import sha256_of
from packhorse.track.meter import Figures
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.process_group import from_rank_0, own_rank
from packhorse.train.objectives.documents import log_probabilities
from packhorse.train.objectives.objective import Objective
from packhorse.train.prior import PriorFolder, packs_per_block
from packhorse.train.setup import base_request
from packhorse.train.validation import StorePasses, evaluating

REFERENCE: Final = "reference"
# The values come from equal micro-batches where the number of processes is that of the pass, and are then bit equal;
# else sums of other shapes differ. A reference in bf16 beside training in fp32 was 2e-2 away.
TOLERANCE: Final = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
HASH_DIGITS: Final = 15
"""Digits of a hash that fit an int64, which rank 0 sends to the others."""


@dataclass(frozen=True)
class Reference:
    """The reference model's values for the splits of a run.

    Attributes:
        plan: Plan of a run that starts from the reference model.
        is_start: The reference is the model that the run starts from.
        folders: Values by split.
    """

    plan: RunPlan
    is_start: bool
    folders: dict[str, PriorFolder]

    @property
    def is_finished(self) -> bool:
        """Whether the values of every split are there, and undamaged; a collective."""
        here = own_rank() == 0 and all(folder.is_finished() for folder in self.folders.values())
        return bool(from_rank_0(int(here)))

    def with_values(self, store: PackStore, split: str) -> PackStore:
        """Return the split's store with the log-probability of each document under the reference model."""
        return replace(store, values={**store.values, REFERENCE: self.folders[split].load(REFERENCE)})


def reference_of(plan: RunPlan, tokenizer: PreTrainedTokenizerBase, splits: tuple[str, ...]) -> Reference | None:
    """Return the reference values that the plan's objective needs, None where it needs none; a collective.

    Args:
        plan: Plan of the run.
        tokenizer: Tokenizer of the prepared data.
        splits: Splits that the run reads.
    """
    section: Any = plan.recipe.objective
    if not section.needs_reference:
        return None
    is_start = not isinstance(section.reference, ReferenceSection)
    plan = plan if is_start else _starting_from(plan, section.reference)
    assert plan.data is not None
    request = base_request(plan, torch.device("cpu"), tokenizer, "sdpa")
    facts = {
        "values": "log-probability of each document",
        "data": plan.data.content_hash,
        "weights": from_rank_0(_weights_hash(request) if own_rank() == 0 else 0),
        "model": plan.recipe.model.model_dump(mode="json"),
        "method": plan.recipe.method.model_dump(mode="json"),
        "seed": plan.recipe.seed,
        "precision": plan.recipe.precision,
        "tf32": plan.recipe.tf32,
        "dtype": plan.chosen("model.dtype"),
        "attention": plan.chosen("model.attention"),
    }
    data = Path(plan.data.folder)
    return Reference(plan, is_start, {split: PriorFolder.beside(data, {**facts, "split": split}) for split in splits})


def _starting_from(plan: RunPlan, reference: ReferenceSection) -> RunPlan:
    """Return the plan of a run that starts from the reference model, otherwise unchanged."""
    model = plan.recipe.model.model_copy(
        update={"path": reference.path, "id": reference.id, "revision": reference.revision, "config": None}
    )
    recipe = plan.recipe.model_copy(update={"model": model})
    return plan.model_copy(update={"recipe": recipe, "base_model": reference.path or reference.id})


def _weights_hash(request: ModelRequest) -> int:
    """Return a hash of the content of the weight files; of nothing for a fresh model, which its seed decides."""
    files = [] if request.source is None else sorted(weight_files(request))
    # The hub's cache holds links.
    hashes = [sha256_of(Path(file).resolve()) for file in files]
    return int(hashlib.sha256("".join(hashes).encode()).hexdigest()[:HASH_DIGITS], 16)


def reference_pass(folder: PriorFolder, engine: Engine, passes: StorePasses, sequence: SequenceGroup | None) -> None:
    """Store the log-probability of each document of a split under the engine's model; a collective.

    Nothing is drawn at random, so training afterwards is the same as without this pass.

    Args:
        folder: Where the values are stored; a pass that was interrupted continues.
        engine: The engine with the wrapped model.
        passes: Passes over the split.
        sequence: Ranks that share each pack with this one.
    """
    store, is_main = passes.store, own_rank() == 0
    logp = np.zeros(store.num_documents)
    done = 0
    if is_main:
        for first, done, arrays in folder.blocks():
            logp[_documents(store, first, done)] = arrays[REFERENCE]
    done = from_rank_0(done)
    with torch.no_grad(), evaluating(engine.model):
        for first, end in _blocks(done, store.num_packs, packs_per_block(passes.packs_per_pass)):
            for micro_batch in passes.micro_batches(first, end):
                values = log_probabilities(engine.model, micro_batch, engine.device, sequence)
                # Ranks that share a pack have its values in equal parts, and add up to them below.
                logp[micro_batch.documents.numpy()] = values.whole.cpu().numpy() / values.num_ranks
            documents = _documents(store, first, end)
            block = torch.from_numpy(logp[documents])
            if engine.control is not None:
                dist.all_reduce(block, group=engine.control)
            logp[documents] = block.numpy()
            if is_main:
                folder.write_block(first, end, {REFERENCE: block.numpy()})
    if is_main:
        folder.finish({REFERENCE: logp})
    engine.sum_over_ranks([0.0])  # the values are on disk before any rank reads them


def prove_reference(
    reference: Reference,
    engine: Engine,
    objective: Objective,
    passes: StorePasses,
    sequence: SequenceGroup | None,
) -> Figures:
    """Prove before step 1 that the model equals its reference, on the first micro-batch of each rank; a collective.

    The loss with the stored reference must be the loss of a model that equals its reference: log 2 per pair for dpo.

    Raises:
        UserError: It is not.
    """
    recipe, folder = reference.plan.recipe, reference.folders["train"].folder
    with torch.no_grad(), evaluating(engine.model):
        stored = next(passes.micro_batches(0, passes.packs_per_pass))
        assert stored.values is not None
        values = stored.values.clone()
        logp = log_probabilities(engine.model, stored, engine.device, sequence).whole
        values[:, stored.value_names.index(REFERENCE)] = logp.cpu()
        losses = [
            float(objective(engine.model, each, engine.device, sequence).total)
            for each in (stored, replace(stored, values=values))
        ]
    num_rows = len(stored.documents) / passes.store.documents_per_row / (sequence.size if sequence else 1)
    loss, expected, total_rows = engine.sum_over_ranks([*losses, num_rows])
    difference = abs(loss - expected) / total_rows
    tolerance = TOLERANCE["fp16" if recipe.tf32 and recipe.precision == "fp32" else recipe.precision]
    if not difference <= tolerance:
        raise UserError(
            f"before step 1 the loss is {loss / total_rows:.6f}, and {expected / total_rows:.6f} for a model that"
            f" equals its reference: {difference:.1e} apart, {tolerance:.0e} is allowed.",
            "the log-probabilities of the reference model were not computed by the model that trains now.",
            f"remove {folder}, and start again: they are then computed again.",
        )
    return {"proof/reference_difference": difference}


def _blocks(first: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + size, end)) for at in range(first, end, size))


def _documents(store: PackStore, first: int, end: int) -> NDArray[np.int64]:
    """Return the indices of the documents in packs `first` to `end`."""
    return store.packs[store.pack_offsets[first] : store.pack_offsets[end]]
