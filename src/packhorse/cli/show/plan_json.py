"""A plan and its estimates as one JSON value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from packhorse.estimate.evaluation import estimate_evaluation
from packhorse.estimate.plan_estimate import PlanEstimate
from packhorse.estimate.search.auto import LeastHardware
from packhorse.estimate.search.candidates import Candidate, rejection_reason
from packhorse.estimate.search.changes import Change
from packhorse.estimate.search.scaling import Scaling
from packhorse.estimate.training_state import Component
from packhorse.plan.command import job_argv, launch_files
from packhorse.workflows.plan_request import PlanResult

Value = dict[str, Any]


def plan_value(result: PlanResult, now: datetime) -> Value:
    """Return everything that the terminal shows; bytes, seconds and shares as numbers.

    Args:
        result: The plan and its estimates.
        now: Start of the run, from which its end is counted.
    """
    plan, case, topology = result.plan, result.case, result.plan.topology
    value: Value = {
        "topology": topology.model_dump() | {"world_size": topology.world_size},
        "batch": plan.batch.model_dump()
        | {
            "null_packs": plan.batch.num_null_packs(topology.data_ranks),
            "tokens_per_step": plan.batch.packs_per_step * plan.batch.length_tokens,
            "steps": plan.num_steps,
        },
        "decisions": [decision.model_dump() for decision in plan.decisions],
        "run_folder": plan.run_folder,
        "argv": list(plan.argv),
        "files": list(launch_files(plan)),
        "job": list(job_argv(plan)),
        "env": plan.env,
        "deepspeed": plan.deepspeed,
    }
    if case is None:
        return value | {"unknown": result.unknown}
    return value | _estimates(case, now) | {"changes": [_change(change) for change in result.changes]}


def ways_value(candidates: Sequence[Candidate], winner: Candidate) -> list[Value]:
    """Return one value per configuration of `--compare`."""
    values = []
    for way in candidates:
        value = _way(way) | {"best": way == winner, "rejection_reason": rejection_reason(way, winner)}
        if way.case is not None:
            value |= _fields(way.case, "fits", "margin", "required_bytes", "step_seconds")
            value |= {"mfu": way.case.speed.mfu, "host_required_bytes": way.case.storage.host_bytes}
        values.append(value)
    return values


def least_value(results: Sequence[LeastHardware]) -> list[Value]:
    """Return one value per kind of GPU of `--gpus auto`."""
    values = []
    for least in results:
        value: Value = {"gpu": least.gpu.name, "count": least.count, "refused": least.refused}
        if least.way is not None and least.way.case is not None:
            case = least.way.case
            value |= _way(least.way) | _fields(case, "required_bytes", "step_seconds")
            value |= _fields(case.speed, "hours", "price")
        values.append(value)
    return values


def scaling_value(scaling: Scaling) -> Value:
    """Return weak or strong scaling as a value; impossible points have a reason."""
    points = []
    for point in scaling.points:
        value = _fields(point, "gpus", "packs", "refused")
        if point.estimate is not None:
            value["step_seconds"] = point.estimate.step_seconds
            value |= _fields(point, "tokens_per_second", "efficiency", "waiting", "required_bytes")
        points.append(value)
    return {"mode": scaling.mode, "points": points} | _fields(scaling, "stopped_at", "stopped_by", "reason")


def _fields(of: object, *names: str) -> Value:
    return {name: getattr(of, name) for name in names}


def _way(way: Candidate) -> Value:
    return _fields(way, "engine", "micro", "checkpointing")


def _estimates(case: PlanEstimate, now: datetime) -> Value:
    memory, storage, speed = case.memory, case.storage, case.speed
    ready = None if speed.hours is None else (now + timedelta(hours=speed.hours)).isoformat(timespec="minutes")
    return {
        "gpu": case.basis.gpu.name,
        "packs_are_measured": case.basis.packs.is_measured,
        "guessed_packs": case.basis.guessed.num_packs if case.basis.guessed is not None else None,
        "steps": case.num_steps,
        "memory": {
            "card_bytes": case.basis.gpu.memory_bytes,
            "required_bytes": memory.required_bytes,
            "fits": case.fits,
            "margin": case.margin,
            "peak": memory.peak.name,
            "phases": {phase.name: _parts(phase.components) for phase in memory.phases},
            "outside": _parts(memory.outside),
        },
        "evaluation": asdict(estimate_evaluation(case)),
        "host": _parts(storage.host),
        "host_bytes": case.basis.host_bytes,
        "disk": _parts(storage.disk),
        "local_disk": _parts(storage.local_disk),
        "time": {
            "step_seconds": speed.step_seconds,
            "parts": {part.name: part.seconds for part in speed.parts},
            "before_seconds": speed.before_seconds,
            **_fields(speed, "tokens_per_second_per_gpu", "model_flops", "hardware_flops", "mfu", "hfu", "hours"),
            "ready": ready,
            **_fields(speed, "energy_kwh", "price", "uncertainty", "uncertainty_reason"),
            "measured_over_predicted": speed.factor,
        },
    }


def _parts(parts: Sequence[Component]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for part in parts:
        # Gradients of this micro-batch and accumulated gradients have one name.
        sizes[part.name] += part.bytes
    return sizes


def _change(change: Change) -> Value:
    return {
        "change": change.words,
        "required_bytes": change.case.required_bytes,
        "tokens_per_second_per_gpu": change.case.speed.tokens_per_second_per_gpu,
        "slower": change.slower,
        "result": change.result,
    }
