"""Everything that the report of a run shows, read from its folder; a damaged part becomes a note. Imports no torch."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ConfigDict

from packhorse.data.data_manifest import DataManifest
from packhorse.errors import UserError
from packhorse.evaluate.results import Comparison
from packhorse.plan.run_plan import Prediction, RunPlan
from packhorse.report.curves import Curve, Point, series_of
from packhorse.report.evaluation_words import headline_line
from packhorse.report.row_changes import RowChanges, read_row_changes
from packhorse.run_folder.attempts import AttemptRecord, lost_steps, made_steps, read_attempts
from packhorse.run_folder.layout import (
    ATTEMPTS_FILE,
    DATA_FILE,
    EVALUATION_FILE,
    EVALUATION_FOLDER,
    METRICS_FILE,
    PLAN_FILE,
    RECIPE_FILE,
    RESULT_FILE,
    ROWS_FILE,
    SKIPPED_STEPS_FILE,
    STATUS_FILE,
    TEST_EVALUATION_FILE,
)
from packhorse.run_folder.metrics import read_metrics
from packhorse.run_folder.result import Result, read_result
from packhorse.run_folder.skipped_steps import read_skipped_steps
from packhorse.run_folder.status import Status, read_status
from packhorse.track.overfitting import overfitting

GIB: Final = 2**30


@dataclass(frozen=True)
class _Plotted:
    """What one plot shows: metric keys with the names of their series, and what their values are divided by."""

    title: str
    unit: str
    names: Mapping[str, str]
    divisor: float = 1
    is_log_if_wide: bool = False


PLOTTED: Final = (
    _Plotted(
        "Loss",
        "nats per supervised token",
        {"train/loss": "train", "evaluation/loss": "validation"},
        is_log_if_wide=True,
    ),
    _Plotted("Learning rate", "", {"train/learning_rate": "learning rate"}),
    _Plotted("Gradient norm", "before clipping", {"train/grad_norm": "gradient norm"}, is_log_if_wide=True),
    _Plotted("Throughput", "tokens per second, all processes", {"speed/tokens_per_second": "tokens per second"}),
    _Plotted("MFU", "share of the GPU's peak", {"speed/mfu": "MFU"}),
    _Plotted("Peak memory", "GiB, rank 0", {"memory/peak_bytes": "peak memory"}, divisor=GIB),
)
SECONDS: Final = {
    "data": "speed/data_seconds",
    "compute": "speed/compute_seconds",
    "evaluation and checkpoints": "speed/other_seconds",
}
Value = TypeVar("Value")


class Speed(BaseModel):
    """Speed and memory of a run; None for what it did not log."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    tokens_per_second: float | None
    """Mean over the time of all logged steps, evaluation and checkpoints excluded."""
    mfu: float | None
    """Weighted in the same manner."""
    step_seconds: float | None
    seconds: dict[str, float]
    """Seconds of the logged steps: waiting for data, compute, evaluation and checkpoints."""
    elapsed_seconds: float | None
    """Seconds of all attempts, without pauses."""
    peak_bytes: float | None
    """Highest peak memory that was logged, of rank 0."""


class RunReport(BaseModel):
    """Figures of a run; what RUN/report.json holds."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings", use_attribute_docstrings=True)

    name: str
    state: str
    step: int
    num_steps: int
    message: str
    overfitting: str
    """Since when the run overfits, and the losses; empty if it does not."""
    evaluation: Comparison | None
    test_evaluation: Comparison | None
    curves: tuple[Curve, ...]
    speed: Speed
    predicted: Prediction | None
    attempts: tuple[AttemptRecord, ...]
    made_steps: int
    """Steps that all attempts made, repeated ones included."""
    lost_steps: int
    """Steps whose work was lost or repeated."""
    skipped_steps: dict[int, str]
    """Reason for each step whose update was skipped."""
    data: DataManifest | None
    changes: RowChanges | None
    environment: dict[str, str]
    hashes: dict[str, str]
    notes: tuple[str, ...]
    """What cannot be read, in sentences."""


class _Reader:
    """Reads parts of a run folder; what is damaged becomes a note and None."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []

    def read(self, name: str, make: Callable[[Path], Value]) -> Value | None:
        """Return `make(path)`, or None if the file is absent or damaged."""
        try:
            return make(self.folder / name)
        except FileNotFoundError:
            return None
        except (UserError, ValueError, KeyError, OSError) as error:
            reason = error.mistakes[0].fact if isinstance(error, UserError) else str(error).splitlines()[0]
            self.notes.append(f"{name} cannot be read and is not shown: {reason}")
            return None


def read_report(plan: RunPlan) -> RunReport:
    """Return the report of a run in any state."""
    folder = Path(plan.run_folder)
    reader = _Reader(folder)
    status = reader.read(STATUS_FILE, lambda _: read_status(folder))
    attempts = tuple(reader.read(ATTEMPTS_FILE, lambda _: read_attempts(folder)) or ())
    points = reader.read(METRICS_FILE, lambda path: _points(path, reader.notes)) or {}
    evaluation, test_evaluation = (
        reader.read(name, lambda path: Comparison.model_validate_json(path.read_text(encoding="utf-8")))
        for name in (EVALUATION_FILE, TEST_EVALUATION_FILE)
    )
    data = reader.read(DATA_FILE, lambda path: DataManifest.model_validate_json(path.read_text(encoding="utf-8")))
    step = status.step if status is not None else 0
    return RunReport(
        name=folder.name,
        state=status.state if status is not None else "not known",
        step=step,
        num_steps=plan.num_steps or 0,
        message=status.message if status is not None else "",
        overfitting=reader.read(METRICS_FILE, lambda path: overfitting(read_metrics(path), plan.recipe.evaluation))
        or "",
        evaluation=_without_samples(evaluation),
        test_evaluation=_without_samples(test_evaluation),
        curves=tuple(_curves(points)),
        speed=_speed(points),
        predicted=plan.predicted,
        attempts=attempts,
        made_steps=made_steps(attempts),
        lost_steps=lost_steps(attempts, step),
        skipped_steps=reader.read(SKIPPED_STEPS_FILE, lambda _: read_skipped_steps(folder)) or {},
        data=data,
        changes=reader.read(f"{EVALUATION_FOLDER}/{ROWS_FILE}", lambda path: _changes(path, evaluation)),
        environment=_environment(plan, status, reader.read(RESULT_FILE, lambda _: read_result(folder))),
        hashes=_hashes(folder, data),
        notes=tuple(reader.notes),
    )


def _without_samples(comparison: Comparison | None) -> Comparison | None:
    """Return the comparison without its samples: the report shows wins and losses, with their keys."""
    return None if comparison is None else comparison.model_copy(update={"samples": ()})


def _points(path: Path, notes: list[str]) -> dict[str, list[Point]]:
    """Return (step, value) of every figure; lines without a finite step are counted in a note, other values skipped."""
    points: dict[str, list[Point]] = defaultdict(list)
    num_lines = 0
    for line in read_metrics(path):
        step = line["step"]
        if not _is_number(step) or not math.isfinite(step):
            continue
        num_lines += 1
        for key, value in line.items():
            if key != "step" and _is_number(value):
                points[key].append((float(step), float(value)))
    with path.open("rb") as file:
        num_damaged = sum(1 for raw in file if raw.strip()) - num_lines
    if num_damaged:
        notes.append(f"{num_damaged:,} lines of {METRICS_FILE} cannot be read and are not shown.")
    return points


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _curves(points: Mapping[str, Sequence[Point]]) -> Iterator[Curve]:
    for each in PLOTTED:
        found = [
            series_of(name, [(step, value / each.divisor) for step, value in points.get(key, ())])
            for key, name in each.names.items()
        ]
        series = tuple(one for one in found if one is not None)
        if series:
            yield Curve(title=each.title, unit=each.unit, is_log_if_wide=each.is_log_if_wide, series=series)


def _speed(points: Mapping[str, Sequence[Point]]) -> Speed:
    steps = [step for step, _ in points.get("speed/step_seconds", ())]
    # A line has means over the steps since the line before.
    counts = {step: step - before for before, step in zip([0.0, *steps], steps)}

    def total(key: str) -> float | None:
        values = [value * counts.get(step, 0.0) for step, value in points.get(key, ()) if math.isfinite(value)]
        return sum(values) if values else None

    busy: dict[float, float] = defaultdict(float)
    for key in (SECONDS["data"], SECONDS["compute"]):
        for step, value in points.get(key, ()):
            busy[step] += counts.get(step, 0.0) * value

    def weighted(key: str) -> float | None:
        weights = [(busy[step], value) for step, value in points.get(key, ()) if math.isfinite(value)]
        weight = sum(each for each, _ in weights)
        return sum(each * value for each, value in weights) / weight if weight > 0 else None

    num_steps = sum(counts.values())
    all_seconds = total("speed/step_seconds")
    memory = [value for _, value in points.get("memory/peak_bytes", ()) if math.isfinite(value)]
    elapsed = [value for _, value in points.get("time/elapsed_seconds", ()) if math.isfinite(value)]
    seconds = {name: total(key) for name, key in SECONDS.items()}
    return Speed(
        tokens_per_second=weighted("speed/tokens_per_second"),
        mfu=weighted("speed/mfu"),
        step_seconds=all_seconds / num_steps if all_seconds is not None and num_steps > 0 else None,
        seconds={name: value for name, value in seconds.items() if value is not None},
        elapsed_seconds=max(elapsed, default=None),
        peak_bytes=max(memory, default=None),
    )


def _changes(path: Path, evaluation: Comparison | None) -> RowChanges | None:
    found = headline_line(evaluation) if evaluation is not None else None
    if found is None or found[1].unit == "nats":
        return None
    line, result = found
    return read_row_changes(path, line.set, result.metric, result.unit, result.higher_is_better)


def _environment(plan: RunPlan, status: Status | None, result: Result | None) -> dict[str, str]:
    topology, batch, recipe = plan.topology, plan.batch, plan.recipe
    processes = f"{topology.world_size} on {topology.num_nodes} node" + "s" * (topology.num_nodes > 1)
    found = {
        "Packhorse": plan.packhorse_version,
        "Base model": plan.base_model or "fresh weights",
        "Method": recipe.method.kind,
        "Tokenizer": plan.data.tokenizer if plan.data is not None else "not prepared yet",
        "Device": topology.device + (f", {plan.predicted.gpu}" if plan.predicted is not None else ""),
        "Engine": topology.engine,
        "Processes": processes,
        "Precision": str(recipe.precision),
        "Batch": f"{batch.packs_per_step} packs of {batch.length_tokens:,} tokens per step, "
        f"{batch.micro_packs} per pass, {batch.accumulation_steps} passes",
        "Seed": str(recipe.seed),
    }
    if result is not None:
        found["Result"] = result.words
    return found | ({"Host": status.host} if status is not None and status.host else {})


def _hashes(folder: Path, data: DataManifest | None) -> dict[str, str]:
    found = {}
    if data is not None:
        found["prepared data"] = data.content_hash
        if data.test_rows:
            found["test rows"] = data.test_rows
        found |= {f"source {source.path}": source.sha256 for source in data.sources}
    for name in (RECIPE_FILE, PLAN_FILE, EVALUATION_FILE, TEST_EVALUATION_FILE):
        if (folder / name).is_file():
            found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return found
