"""Checkpoints: temporary folder, every file on disk, rename, COMPLETE marker; what lacks the marker does not exist.

RUN/checkpoints/step-000100/
    model/ or adapter/       weights in Hugging Face form
    optimizer-*.safetensors  the optimizer's states by parameter name (single, ddp, fsdp2, hsdp)
    optimizer.json           those that are no tensors
    deepspeed/               DeepSpeed's own sharded files            (zero*)
    state.json               step, counters, world size, content hash of the data
    COMPLETE                 written last
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from packhorse.durable import disk_error, publish_folder, sync_to_disk
from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.train.engine import Engine
from packhorse.train.optimizer_state import load_optimizer, save_optimizer
from packhorse.train.state import TrainState
from packhorse.train.weights import gather_kept, save_weights, unwrapped, weights_folder_name

MARKER = "COMPLETE"
STATE_FILE = "state.json"
DEEPSPEED_FOLDER = "deepspeed"


class Checkpoints:
    """The checkpoints of one run; `save` is a collective, files are written by rank 0 (and by DeepSpeed)."""

    def __init__(self, plan: RunPlan, engine: Engine, is_main: bool) -> None:
        self.folder = Path(plan.run_folder) / "checkpoints"
        self._plan = plan
        self._engine = engine
        self._is_main = is_main

    def save(self, state: TrainState) -> Path:
        """Writes a checkpoint of this step unless it stands already, then removes those no longer kept.

        Raises:
            UserError: The disk refuses.
        """
        target = self.folder / f"step-{state.step:06d}"
        if (target / MARKER).is_file():
            return target
        temporary = self.folder / f".{target.name}.tmp"
        if self._is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._wait()
        weights = gather_kept(self._engine, self._is_main)
        try:
            self._write_optimizer(temporary)
            if self._is_main:
                self._write(temporary, state, weights)
                _publish(temporary, target)
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
        written = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if self._engine.is_deepspeed != (checkpoint / DEEPSPEED_FOLDER).is_dir():
            raise UserError(
                f"{checkpoint} was written under {written['engine']}, and this run uses {self._plan.topology.engine}.",
                "DeepSpeed and torch keep optimizer states in different forms.",
                f"resume with parallel.engine {written['engine']}.",
            )
        if not self._engine.is_deepspeed:
            load_optimizer(*self._stepped(), checkpoint)
            return
        if written["world_size"] != self._plan.topology.world_size:
            raise UserError(
                f"{checkpoint} was written by {written['world_size']} processes, and"
                f" {self._plan.topology.world_size} would resume.",
                "ZeRO shards the optimizer by rank.",
                f"resume with {written['world_size']} processes.",
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
        assert self._plan.data is not None
        record = {
            **asdict(state),
            "engine": self._plan.topology.engine,
            "world_size": self._plan.topology.world_size,
            "data": self._plan.data.content_hash,
        }
        (temporary / STATE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _remove_old(self, state: TrainState) -> None:
        keep = complete_checkpoints(self.folder)[-self._plan.recipe.checkpoint.keep_last :]
        best = f"step-{state.best_step:06d}" if state.best_step is not None else None
        for checkpoint in complete_checkpoints(self.folder):
            is_best = self._plan.recipe.checkpoint.keep_best and checkpoint.name == best
            if checkpoint not in keep and not is_best:
                # First the marker: what is half removed must not look complete.
                (checkpoint / MARKER).unlink()
                shutil.rmtree(checkpoint)

    def _wait(self) -> None:
        if self._engine.control is not None:
            dist.barrier(group=self._engine.control)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with their marker, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MARKER}"))


def read_state(checkpoint: Path) -> TrainState:
    """The counters stored with a checkpoint."""
    record = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return TrainState(**{name: record[name] for name in TrainState.__dataclass_fields__})


def _publish(temporary: Path, target: Path) -> None:
    publish_folder(temporary, target)
    marker = target / MARKER
    marker.touch()
    sync_to_disk(marker)
    sync_to_disk(target)
