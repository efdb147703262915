"""What a rank loads before training: the engine with its model, and the packs with the reference model's values."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from packhorse.data.packs.store import PackStore, open_store
from packhorse.model.parameters import ParameterCount, count_parameters, trained_kinds
from packhorse.model.sequence import SequenceGroup
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.heartbeat import Phase
from packhorse.train.engine.engine import Engine, start_engine
from packhorse.train.engine.joint_optimizer import InBackwardOptimizer
from packhorse.train.engine.optimizer import make_optimizer
from packhorse.train.ranks.agreement import Agreement
from packhorse.train.ranks.attempt import Attempt
from packhorse.train.reference import Reference, reference_of, reference_pass
from packhorse.train.setup import training_model
from packhorse.train.teacher import with_teacher
from packhorse.train.validation import StorePasses


@dataclass(frozen=True)
class Loaded:
    """Result of `Start.load`.

    Attributes:
        engine: The engine with the model that trains.
        count: Its parameters.
        stores: Packs by split: train, and validation where the run has and reads it.
        reference: Values of the reference model, where the objective needs them.
        teacher: Model that runs beside the one that trains; None for none.
    """

    engine: Engine
    count: ParameterCount
    stores: dict[str, PackStore]
    reference: Reference | None
    teacher: nn.Module | None = None


@dataclass(frozen=True)
class Start:
    """Loads what a run needs.

    Attributes:
        plan: Plan of the run.
        attempt: This rank's part in the attempt.
        accelerator: Accelerate's handle.
        tokenizer: Tokenizer of the prepared data.
        agreement: Exchanges requests between ranks.
        sequence: Ranks that share each pack with this one.
        rank: This rank.
    """

    plan: RunPlan
    attempt: Attempt
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    agreement: Agreement
    sequence: SequenceGroup | None
    rank: int

    def load(self, checkpoint: Path | None) -> Loaded:
        """Load the model, after the values of a reference model or a teacher; a collective.

        Args:
            checkpoint: Checkpoint to resume from.

        Raises:
            UserError: The model cannot be loaded.
            Stopped: Some rank was requested to stop.
        """
        device, before_pass = self.accelerator.device, self.attempt.still_before_training
        stores, teacher = with_teacher(self.plan, self.tokenizer, device, open_stores(self.plan), before_pass)
        reference = reference_of(self.plan, self.tokenizer, tuple(stores))
        if reference is None:
            return Loaded(*self._engine(self.plan, checkpoint), stores, None, teacher)
        if not reference.is_finished and not (reference.is_start and checkpoint is None):
            # Loaded first and freed again, so that there is never a second model in memory.
            engine, _ = self._engine(reference.plan, None)
            self._compute(reference, engine, stores)
            engine.free()
        engine, count = self._engine(self.plan, checkpoint)
        if not reference.is_finished:
            self._compute(reference, engine, stores)
        stores = {split: reference.with_values(store, split) for split, store in stores.items()}
        return Loaded(engine, count, stores, reference)

    def passes(self, engine: Engine, store: PackStore, phase: Phase) -> StorePasses:
        """Return this rank's passes over a store; a stop request ends them, and each renews the phase."""

        def before_pass() -> None:
            self.attempt.pulse.phase(phase)
            self.agreement.raise_if_stopped(engine)

        size = self.plan.topology.sequence
        micro, ranks = self.plan.batch.micro_packs, self.plan.topology.data_ranks
        return StorePasses(store, micro, self.rank // size, ranks, before_pass)

    def _engine(self, plan: RunPlan, checkpoint: Path | None) -> tuple[Engine, ParameterCount]:
        self.attempt.pulse.phase("load")
        model = training_model(plan, self.tokenizer, self.accelerator.device, checkpoint, self.attempt.still_loading)
        count = count_parameters(model)
        logging.info("trained: %s", "; ".join(str(kind) for kind in trained_kinds(model)))
        optimizer = make_optimizer(model, plan.recipe)
        engine = start_engine(self.accelerator, plan, model, optimizer)
        if isinstance(optimizer, InBackwardOptimizer):
            optimizer.step_in_backward()
        return engine, count

    def _compute(self, reference: Reference, engine: Engine, stores: dict[str, PackStore]) -> None:
        for split, store in stores.items():
            logging.info("log-probabilities under the reference model: %s, %d packs", split, store.num_packs)
            reference_pass(reference.folders[split], engine, self.passes(engine, store, "prior"), self.sequence)


def open_stores(plan: RunPlan) -> dict[str, PackStore]:
    """Return the packs by split: train, and validation where the run has and reads it."""
    assert plan.data is not None, "a plan is only run once its data is prepared"
    folder = Path(plan.data.folder)
    stores = {"train": open_store(folder, "train")}
    if not plan.is_trial:
        with suppress(FileNotFoundError):
            stores["validation"] = open_store(folder, "validation")
    return stores
