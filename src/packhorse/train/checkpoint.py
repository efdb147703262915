"""Checkpoints: temporary folder, every file on disk, rename, COMPLETE marker; what lacks the marker does not exist.

RUN/checkpoints/step-000100/
    model/ or adapter/       weights in Hugging Face form
    optimizer.safetensors    AdamW's moments by parameter name        (ddp, fsdp2)
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from packhorse.durable import disk_error, publish_folder, sync_to_disk
from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.train.engine import Engine
from packhorse.train.state import TrainState
from packhorse.train.weights import gather_trainable, save_weights, unwrapped, weights_folder_name

MARKER = "COMPLETE"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
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
        self._write_sharded(temporary)
        weights = gather_trainable(self._engine, self._is_main)
        moments = _gather_moments(self._engine, self._is_main)
        if self._is_main:
            try:
                self._write(temporary, state, weights, moments)
                _publish(temporary, target)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise disk_error(target, error) from error
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
            _load_moments(self._engine, checkpoint / OPTIMIZER_FILE)
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

    def _write_sharded(self, temporary: Path) -> None:
        if self._engine.is_deepspeed:
            model: Any = self._engine.model
            model.save_checkpoint(
                str(temporary / DEEPSPEED_FOLDER), tag="state", save_latest=False, exclude_frozen_parameters=True
            )

    def _write(
        self, temporary: Path, state: TrainState, weights: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> None:
        save_weights(unwrapped(self._engine), weights, temporary / weights_folder_name(self._plan), None)
        if moments:
            save_file(moments, temporary / OPTIMIZER_FILE)
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


def _gather_moments(engine: Engine, is_main: bool) -> dict[str, Tensor]:
    """AdamW's state as `parameter name/slot`; a collective under FSDP2, nothing under DeepSpeed."""
    if engine.is_deepspeed:
        return {}
    gathered = {}
    for name, parameter in unwrapped(engine).named_parameters():
        for slot, value in engine.optimizer.state.get(parameter, {}).items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if is_main:
                gathered[f"{name}/{slot}"] = whole.detach().to("cpu", copy=True)
    return gathered


def _load_moments(engine: Engine, file: Path) -> None:
    parameters = dict(unwrapped(engine).named_parameters())
    with safe_open(file, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118  (safe_open is no mapping)
            name, slot = key.rsplit("/", 1)
            parameter = parameters[name]
            engine.optimizer.state[parameter][slot] = _like(stored.get_tensor(key), parameter)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    if value.dim() == 0:  # the step counter, which fused AdamW keeps beside the parameter
        return value.to(parameter.device)
    if isinstance(parameter, DTensor):
        placed = value.to(parameter.device)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
