"""Checkpoints: temporary folder, every file on disk, manifest, rename; what does not fit its manifest does not exist.

RUN/checkpoints/step-000100/
    model/ or adapter/       weights in Hugging Face form
    optimizer-*.safetensors  the optimizer's states by parameter name (single, ddp, fsdp2, hsdp)
    optimizer.json           those that are no tensors
    deepspeed/               DeepSpeed's own sharded files            (zero*)
    state.json               step and counters
    manifest.json            written last: size and sha256 of each file; engine, world size, plan, data
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from packhorse.checkpoints.manifest import RunFacts, faults_of, read_manifest, write_manifest
from packhorse.checkpoints.shelf import (
    Found,
    complete_checkpoints,
    folder_name,
    newest_sound,
    remove_checkpoint,
    set_aside_newer,
    step_of,
    superseded,
)
from packhorse.durable import disk_error, sync_to_disk
from packhorse.errors import UserError
from packhorse.plan.run_plan import PLAN_FILE, RunPlan
from packhorse.track.trackers import WANDB_ID_FILE
from packhorse.train.engine import Engine
from packhorse.train.optimizer_state import load_optimizer, save_optimizer
from packhorse.train.state import TrainState
from packhorse.train.weights import gather_kept, save_weights, unwrapped, weights_folder_name

STATE_FILE = "state.json"
DEEPSPEED_FOLDER = "deepspeed"
# In place of a step, where rank 0 has none to go on from.
NONE_WRITTEN, NONE_IS_SOUND = -1, -2


class Checkpoints:
    """The checkpoints of one run; `save` is a collective, files are written by rank 0 (and by DeepSpeed)."""

    def __init__(self, plan: RunPlan, engine: Engine, is_main: bool) -> None:
        self.folder = Path(plan.run_folder) / "checkpoints"
        self._plan = plan
        self._engine = engine
        self._is_main = is_main

    def save(self, state: TrainState) -> Path:
        """Writes a checkpoint of this step unless it stands already, reads it back, removes those no longer kept.

        Raises:
            UserError: The disk refuses, or gives back other bytes than were written.
        """
        target = self.folder / folder_name(state.step)
        if read_manifest(target) is not None:
            return target
        temporary = self.folder / f".{target.name}.tmp"
        if self._is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._wait()
        weights = gather_kept(self._engine, self._is_main)
        try:
            self._write_optimizer(temporary)
            self._wait()  # every rank's files are there before any is hashed
            if self._is_main:
                self._write(temporary, state, weights)
                self._publish(temporary, target, state)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise disk_error(target, error) from error
        if self._is_main:
            self._remove_old(state)
        self._wait()
        return target

    def load_optimizer(self, checkpoint: Path) -> None:
        """Puts the optimizer where it was; the weights were loaded with the model.

        Raises:
            UserError: The checkpoint is of another engine family or, under ZeRO, another world size.
        """
        manifest = read_manifest(checkpoint)
        assert manifest is not None, "only a checkpoint that was verified is gone on from"
        written = manifest.run
        if self._engine.is_deepspeed != (checkpoint / DEEPSPEED_FOLDER).is_dir():
            raise UserError(
                f"{checkpoint} was written under {written.engine}, and this run uses {self._plan.topology.engine}.",
                "DeepSpeed and torch keep optimizer states in different forms.",
                f"resume with parallel.engine {written.engine}.",
            )
        if not self._engine.is_deepspeed:
            load_optimizer(*self._stepped(), checkpoint)
            return
        if written.world_size != self._plan.topology.world_size:
            raise UserError(
                f"{checkpoint} was written by {written.world_size} processes, and"
                f" {self._plan.topology.world_size} would resume.",
                "ZeRO shards the optimizer by rank.",
                f"resume with {written.world_size} processes.",
            )
        model: Any = self._engine.model
        # Frozen weights were left out when it was saved.
        loaded, _ = model.load_checkpoint(
            str(checkpoint / DEEPSPEED_FOLDER), tag="state", load_module_strict=False, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {checkpoint / DEEPSPEED_FOLDER}")

    def _write_optimizer(self, temporary: Path) -> None:
        if not self._engine.is_deepspeed:
            save_optimizer(*self._stepped(), temporary, self._is_main)
            return
        model: Any = self._engine.model
        model.save_checkpoint(
            str(temporary / DEEPSPEED_FOLDER), tag="state", save_latest=False, exclude_frozen_parameters=True
        )

    def _stepped(self) -> tuple[Optimizer, nn.Module, Any]:
        """The optimizer below accelerate's wrapper, the model whose parameters it steps, the loss scaler."""
        optimizer: Optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        return optimizer, unwrapped(self._engine), self._engine.accelerator.scaler

    def _write(self, temporary: Path, state: TrainState, weights: dict[str, Tensor]) -> None:
        save_weights(unwrapped(self._engine), weights, temporary / weights_folder_name(self._plan), None)
        (temporary / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")

    def _publish(self, temporary: Path, target: Path, state: TrainState) -> None:
        run_folder = Path(self._plan.run_folder)
        wandb_id = run_folder / WANDB_ID_FILE
        assert self._plan.data is not None
        facts = RunFacts(
            step=state.step,
            engine=self._plan.topology.engine,
            world_size=self._plan.topology.world_size,
            plan=hashlib.sha256((run_folder / PLAN_FILE).read_bytes()).hexdigest(),
            data=self._plan.data.content_hash,
            wandb_id=wandb_id.read_text(encoding="utf-8").strip() if wandb_id.is_file() else None,
        )
        write_manifest(temporary, facts)
        shutil.rmtree(target, ignore_errors=True)  # of the same step, and not complete
        temporary.rename(target)
        sync_to_disk(self.folder)

    def _remove_old(self, state: TrainState) -> None:
        newest = self.folder / folder_name(state.step)
        fault = next(faults_of(newest), None)
        if fault is not None:
            raise UserError(
                f"what was just written cannot be read back: {fault}",
                "a checkpoint that is not what training held would be found out only when it is needed.",
                "look at the disk of the run folder; the checkpoints before it stand.",
            )
        section = self._plan.recipe.checkpoint
        best = folder_name(state.best_step) if section.keep_best and state.best_step is not None else None
        for checkpoint in superseded(complete_checkpoints(self.folder), section.keep_last, best):
            remove_checkpoint(checkpoint)

    def _wait(self) -> None:
        if self._engine.control is not None:
            dist.barrier(group=self._engine.control)


def checkpoint_to_resume(run_folder: Path, is_main: bool) -> tuple[Path | None, TrainState]:
    """The newest checkpoint that is as it was written, and its state; a fresh state where the run has none.

    A collective: rank 0 reads the files, since a node's ranks would read the same bytes, and the others take its word.
    Checkpoints that are damaged are set aside under another name, so that their step can be written again.

    Raises:
        UserError: There are checkpoints, and none of them is sound.
    """
    folder = run_folder / "checkpoints"
    found = newest_sound(folder) if is_main else Found(None, ())
    for fault in found.passed_over:
        sys.stderr.write(f"passed over: {fault}\n")
    step = _word_of_rank_0(_step_or(found))
    if step == NONE_IS_SOUND:
        raise UserError(
            f"no checkpoint of {run_folder.name} can be read: {next(iter(found.passed_over), 'see rank 0')}",
            "going on from what is damaged would train another model, and from step 0 is for you to decide.",
            f"look at them with `packhorse verify {run_folder}`; to begin again, remove {folder}.",
        )
    if is_main:
        set_aside_newer(folder, step)
    if step == NONE_WRITTEN:
        return None, TrainState()
    checkpoint = folder / folder_name(step)
    return checkpoint, read_state(checkpoint)


def _step_or(found: Found) -> int:
    if found.checkpoint is not None:
        return step_of(found.checkpoint)
    return NONE_IS_SOUND if found.passed_over else NONE_WRITTEN


def _word_of_rank_0(step: int) -> int:
    if not dist.is_initialized():
        return step
    device = torch.accelerator.current_accelerator() if dist.get_backend() != "gloo" else None
    word = torch.tensor([step], device=device)
    dist.broadcast(word, src=0)
    return int(word.item())


def newest_state(run_folder: Path) -> TrainState:
    """The state of the newest complete checkpoint, whose other files are not read; to tell how far a run is."""
    newest = next(reversed(complete_checkpoints(run_folder / "checkpoints")), None)
    return read_state(newest) if newest else TrainState()


def read_state(checkpoint: Path) -> TrainState:
    """The counters stored with a checkpoint."""
    record = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return TrainState(**{name: record[name] for name in TrainState.__dataclass_fields__})
