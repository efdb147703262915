"""The plan of a run: every decision of the launcher, written to plan.json, the only input of the worker."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from packhorse.errors import UserError
from packhorse.recipe.schema import Engine, ModelSection, Recipe
from packhorse.run_folder.layout import PLAN_FILE

PLAN_VERSION = 1
ATTEMPT_VARIABLE = "PACKHORSE_ATTEMPT"
"""Environment variable with the number of the attempt, set by the launcher for the ranks."""
RANK_LOGS_VARIABLE = "PACKHORSE_RANK_LOGS"
"""Environment variable that makes each rank write its output to a separate file next to its heartbeat."""

Device = Literal["cpu", "cuda"]


class PlanPart(BaseModel):
    """Part of the plan: immutable; unknown keys, as of another version of Packhorse, are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Topology(PlanPart):
    """Placement of the processes on nodes and devices."""

    device: Device
    engine: Engine
    num_nodes: int
    processes_per_node: int
    threads_per_process: int
    """CPU threads of each process."""
    sequence: int = 1
    """Processes with consecutive ranks that share the tokens of each pack."""
    shard_group: int | None = None
    """Processes that shard one copy of the weights under hsdp."""

    @property
    def world_size(self) -> int:
        """Total number of processes."""
        return self.num_nodes * self.processes_per_node

    @property
    def data_ranks(self) -> int:
        """Number of shares into which the packs of a step are divided."""
        return self.world_size // self.sequence


class BatchSplit(PlanPart):
    """Split of one optimizer step: data ranks x accumulation steps x micro packs; null packs fill what is left over."""

    length_tokens: int
    packs_per_step: int
    micro_packs: int
    accumulation_steps: int

    @property
    def packs_per_rank(self) -> int:
        """Number of packs of each data rank in a step, null packs included."""
        return self.micro_packs * self.accumulation_steps

    def num_null_packs(self, data_ranks: int) -> int:
        """Return how many packs of a step are empty, over all data ranks."""
        return data_ranks * self.packs_per_rank - self.packs_per_step


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
    units_per_step: tuple[float, int, int] | None = None
    """Mean, least and most preference pairs or judged answers of a step; None for objectives over tokens."""


class Decision(PlanPart):
    """Automatic choice and its reason, in words."""

    name: str
    value: str
    reason: str


class FlopCounts(PlanPart):
    """FLOPs that a trained token takes, and those that a GPU could do."""

    model_per_token: float
    """Forward and backward pass, nothing twice: mean of a real token of the packs."""
    hardware_per_token: float
    """The same with what runs again: recomputed layers and logits, attention's backward pass."""
    peak_per_second: float
    """Peak of one GPU under the recipe's precision."""

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """Return MFU and HFU of one GPU (PaLM, arXiv 2204.02311, appendix B), by metric key."""
        share = tokens_per_second / self.peak_per_second
        return {"speed/mfu": share * self.model_per_token, "speed/hfu": share * self.hardware_per_token}


class Prediction(PlanPart):
    """Memory and time that the plan predicted."""

    gpu: str
    """Name of the GPU profile."""
    memory_bytes: int
    """Memory of the GPU."""
    required_bytes: int
    """Peak memory of one GPU, including an assumed amount outside torch's allocator."""
    phase: str
    """Phase of the step with the peak."""
    step_seconds: float
    """Time of one step, without evaluations and checkpoints."""
    flops: FlopCounts | None = None
    """FLOPs; None in plans of an earlier version."""


class TeacherFacts(PlanPart):
    """The teacher of a distillation."""

    model: ModelSection
    """Its weights, by hub name or absolute folder, which may contain `${env:NAME}`."""
    adapter: str | None
    """Folder of an adapter that is merged into them; None for none."""


class RunPlan(PlanPart):
    """Complete plan of a run.

    `num_steps`, `steps_per_epoch` and `data` are None only in a plan that is made before the data is prepared.
    """

    version: int = PLAN_VERSION
    packhorse_version: str
    recipe: Recipe
    run_folder: str
    """Absolute path."""
    base_model: str | None
    """Absolute folder or hub name of the weights to start from; None for a fresh model. May contain `${env:NAME}`."""
    topology: Topology
    batch: BatchSplit
    data: DataFacts | None
    num_steps: int | None
    steps_per_epoch: int | None
    deepspeed: dict[str, Any] | None
    """Complete DeepSpeed configuration; None under single, ddp, fsdp2 and hsdp."""
    argv: tuple[str, ...]
    """Command line of the launch, as a list of words."""
    env: dict[str, str]
    """Environment variables that the worker sets for itself before it imports torch. Never a secret."""
    decisions: tuple[Decision, ...]
    is_trial: bool = False
    """Whether the run only measures its steps (`packhorse tune`): no evaluation, no checkpoint, no result."""
    predicted: Prediction | None = None
    """Prediction for these GPUs; None if the GPUs or the shape of the model are not known."""
    teacher: TeacherFacts | None = None
    """Teacher of a distillation; None for other objectives."""

    def chosen(self, name: str) -> str:
        """Return the value of an automatic choice."""
        return next(decision.value for decision in self.decisions if decision.name == name)

    @property
    def compiles_layers(self) -> bool:
        """Whether each decoder layer is compiled."""
        return self.recipe.parallel.compile is not False and self.chosen("parallel.compile") == "true"


def write_plan(plan: RunPlan, folder: Path) -> Path:
    """Write the plan to `plan.json` in `folder`, and return the path."""
    path = folder / PLAN_FILE
    path.write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def read_plan(path: Path) -> RunPlan:
    """Read a plan from its file or from its run folder.

    Raises:
        UserError: There is no plan, or another version of Packhorse wrote it.
    """
    file = path / PLAN_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{path} contains no {PLAN_FILE}.",
            "`packhorse train RECIPE` creates a run folder, and every later command reads the plan in it.",
            "name a run folder, for example runs/NAME; `ls runs` lists them.",
        )
    try:
        return RunPlan.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, json.JSONDecodeError) as error:
        raise UserError(
            f"{file} cannot be read as a plan of version {PLAN_VERSION} (its version is {_version_of(file)}).",
            f"the file does not match the schema of a plan: {str(error).splitlines()[0]}",
            "train the recipe again under another name, or use the Packhorse version that wrote the run.",
        ) from error


def _version_of(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("version", "none"))
    except (json.JSONDecodeError, AttributeError):
        return "none"


@dataclass(frozen=True)
class Difference:
    """Field with different values in two plans.

    Attributes:
        field: Dotted name; fields of the recipe have no prefix.
        before: Value in the first plan; None if the field is missing there.
        after: Value in the second plan; None if the field is missing there.
    """

    field: str
    before: Any
    after: Any


def differences(before: RunPlan, after: RunPlan) -> list[Difference]:
    """Return the fields of recipe, topology, batch, data, engine, environment and launch that differ.

    Reasons of decisions and predictions follow from these fields and are not compared.
    """
    old, new = (dict(_fields(plan)) for plan in (before, after))
    names = dict.fromkeys((*old, *new))
    return [Difference(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value that is not a mapping, with its dotted name."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fields(plan: RunPlan) -> Iterator[tuple[str, Any]]:
    values = plan.model_dump(exclude={"decisions", "predicted", "version"})
    yield from leaves(values.pop("recipe"))
    yield from leaves(values)
