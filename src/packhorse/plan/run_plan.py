"""RunPlan: all that the launcher decided, as a value on disk; the worker reads this and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from packhorse.errors import UserError
from packhorse.recipe.schema import Engine, Recipe
from packhorse.run_folder.layout import PLAN_FILE

PLAN_VERSION = 1
ATTEMPT_VARIABLE = "PACKHORSE_ATTEMPT"
"""Environment variable by which the launcher tells the ranks the number of the attempt."""
RANK_LOGS_VARIABLE = "PACKHORSE_RANK_LOGS"
"""Where it is set, each rank writes what it says to a file of its own beside its heartbeat."""

Device = Literal["cpu", "cuda"]


class PlanPart(BaseModel):
    """A part of the plan: immutable, and refused if another version of Packhorse wrote other keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Topology(PlanPart):
    """Which processes run where."""

    device: Device
    engine: Engine
    num_nodes: int
    processes_per_node: int
    threads_per_process: int
    """CPU threads of each process."""
    sequence: int = 1
    """Processes that share each pack, a part of its tokens each; neighbours in rank."""
    shard_group: int | None = None
    """Processes that hold one copy of the weights together under hsdp."""

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.num_nodes * self.processes_per_node

    @property
    def data_ranks(self) -> int:
        """Shares that each step's packs are dealt into."""
        return self.world_size // self.sequence


class BatchSplit(PlanPart):
    """How one optimizer step is shared: packs = data ranks x accumulation steps x micro packs."""

    length_tokens: int
    packs_per_step: int
    micro_packs: int
    accumulation_steps: int


class DataFacts(PlanPart):
    """The prepared data that the run reads."""

    folder: str
    """Absolute folder of the data store."""
    content_hash: str
    tokenizer: str
    """Absolute folder or hub name of the tokenizer."""
    num_rows: int
    num_packs: int
    num_tokens: int
    num_supervised_tokens: int
    fill: float


class Decision(PlanPart):
    """One automatic choice and its reason, in words."""

    name: str
    value: str
    reason: str


class Predicted(PlanPart):
    """What the plan counted on before anything was allocated."""

    gpu: str
    """Name of its profile."""
    memory_bytes: int
    """Of the card."""
    required_bytes: int
    """Of one GPU at the fullest moment, with what is assumed to lie outside torch's allocator."""
    phase: str
    """In which it is fullest."""
    step_seconds: float
    """Without evaluations and checkpoints."""


class RunPlan(PlanPart):
    """A run, complete.

    `num_steps`, `steps_per_epoch` and `data` are None only in a plan that is shown before the data is prepared.
    """

    version: int = PLAN_VERSION
    packhorse_version: str
    recipe: Recipe
    run_folder: str
    """Absolute."""
    base_model: str | None
    """Absolute folder or hub name of the weights to start from; None for a fresh model. May hold `${env:NAME}`."""
    topology: Topology
    batch: BatchSplit
    data: DataFacts | None
    num_steps: int | None
    steps_per_epoch: int | None
    deepspeed: dict[str, Any] | None
    """The DeepSpeed configuration as it will run; None under ddp and fsdp2."""
    argv: tuple[str, ...]
    """The launch, word by word."""
    env: dict[str, str]
    """Environment variables that the worker sets for itself before it imports torch. Never a secret."""
    decisions: tuple[Decision, ...]
    predicted: Predicted | None = None
    """None where the GPUs or the model's shape are not known."""

    def chosen(self, name: str) -> str:
        """The value of an automatic choice."""
        return next(decision.value for decision in self.decisions if decision.name == name)


def write_plan(plan: RunPlan, folder: Path) -> Path:
    """Writes the plan as `plan.json` below `folder` and returns its path."""
    path = folder / PLAN_FILE
    path.write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def read_plan(path: Path) -> RunPlan:
    """Reads a plan from its file or from its run folder.

    Raises:
        UserError: There is no plan, or another version of Packhorse wrote it.
    """
    file = path / PLAN_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{path} holds no {PLAN_FILE}.",
            "a run folder is made by `packhorse train RECIPE`, and every later command reads its plan.",
            "name a run folder, for example runs/NAME; `ls runs` lists them.",
        )
    try:
        return RunPlan.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, json.JSONDecodeError) as error:
        found = _version_of(file)
        raise UserError(
            f"{file} cannot be read as a plan of version {PLAN_VERSION} (it says version {found}).",
            f"its form does not fit: {str(error).splitlines()[0]}",
            "train the recipe again under another name, or use the Packhorse version that wrote the run.",
        ) from error


def _version_of(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("version", "none"))
    except (json.JSONDecodeError, AttributeError):
        return "none"
