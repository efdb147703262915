"""A tiny model whose checkpoints are written without a launch, by the real `Checkpoints`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from packhorse.estimate.weights import WeightTensor, list_weights
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan, write_plan
from packhorse.plan.topology import DeviceRequest, detect_hardware
from packhorse.recipe.schema import Recipe
from packhorse.train.checkpoint.checkpoints import Checkpoints
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.optimizer import make_optimizer
from packhorse.train.engine.sharding import Fsdp2, make_mesh
from packhorse.train.state import TrainState
from tiny import TINY

DATA = DataFacts(
    folder="/data",
    content_hash="0" * 16,
    tokenizer="tokenizer",
    num_rows=8,
    num_packs=8,
    num_tokens=2048,
    num_supervised_tokens=1024,
    fill=1.0,
)
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make_run(folder: Path, processes: int = 1, engine: str = "ddp", make: bool = True, **checkpoint: Any) -> RunPlan:
    """Return a run's plan; `make` creates its folder."""
    fields = {**TINY, "runs_folder": str(folder), "checkpoint": {"every_steps": 2, **checkpoint}}
    recipe = Recipe.model_validate({**fields, "parallel": {"processes": processes, "engine": engine}})
    plan = make_plan(recipe, DeviceRequest(None), detect_hardware(), DATA)
    if make:
        Path(plan.run_folder).mkdir(parents=True)
        write_plan(plan, Path(plan.run_folder))
    return plan


class Trainer:
    """A model, its optimizer and its checkpoints; its steps train on made-up ids."""

    def __init__(self, plan: RunPlan, is_main: bool = True, **model: Any) -> None:
        transformers_logging.disable_progress_bar()
        torch.manual_seed(0)
        self.model: nn.Module = LlamaForCausalLM(LlamaConfig(**{**SMALL, **model}))
        if plan.topology.engine == "fsdp2":
            placement = Fsdp2(make_mesh(plan.topology, torch.device("cpu")), "fp32")
            for layer in self.model.model.layers:  # type: ignore[union-attr]
                placement.unit([layer], is_last=False)
            placement.root(self.model)
        self.optimizer = make_optimizer(self.model, plan.recipe)
        accelerator: Any = SimpleNamespace(scaler=None, unwrap_model=lambda model: model, device=torch.device("cpu"))
        self.engine = Engine(accelerator, self.model, self.optimizer, 1.0, clip_norm=None, control=None)
        self.checkpoints = Checkpoints(plan, self.engine, is_main)
        self.state = TrainState()

    def step(self) -> None:
        ids = torch.arange(8).unsqueeze(0) + self.state.step
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = self.state.advanced(8)

    def steps_to(self, step: int) -> TrainState:
        while self.state.step < step:
            self.step()
        return self.state

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def moments(self) -> dict[str, Tensor]:
        """Return copies of the optimizer's states, named as in a checkpoint."""
        return {
            f"{name}/{slot}": value.detach().clone()
            for name, parameter in self.model.named_parameters()
            for slot, value in self.optimizer.state[parameter].items()
        }


def weights_of(plan: RunPlan, **model: Any) -> tuple[WeightTensor, ...]:
    """Return the weights of a `Trainer` that the plan counts."""
    shape = read_shape({**TINY["model"]["config"], "tie_word_embeddings": False, **SMALL, **model})
    assert shape is not None
    held = list_weights(plan, shape)
    assert held is not None
    return held


def buffers_of(trainer: Trainer) -> int:
    """Return the bytes that this rank keeps on its host from save to save."""
    return sum(buffer.nbytes for buffer in trainer.checkpoints._buffers._buffers.values())


def save_at(trainer: Trainer, step: int) -> None:
    """Train to a step, and finish its checkpoint."""
    trainer.checkpoints.save(trainer.steps_to(step))
    trainer.checkpoints.finish()
