"""`--calibrate RUN`: how a run's measured steps compare with what its own plan predicts."""

from __future__ import annotations

from pathlib import Path

from packhorse.commands.costs import Terms, basis_of
from packhorse.commands.parameters import Unknown
from packhorse.data.data_manifest import read_data_manifest
from packhorse.errors import UserError
from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.plan_estimate import SpeedCorrection, estimate_plan
from packhorse.estimate.speed import measured_step_seconds
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import detect_hardware
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import METRICS_FILE
from packhorse.run_folder.metrics import read_metrics


def measured_of(run: RunPlan) -> SpeedCorrection:
    """SpeedCorrection over predicted seconds of a step of a run.

    Raises:
        UserError: It was no run on known GPUs, or has too few figures.
    """
    name = relative(run.run_folder)
    if run.topology.device == "cpu":
        raise UserError(
            f"{name} ran on a CPU.",
            "the time of a GPU's step says nothing there.",
            "leave --calibrate out, or name a run that trained on GPUs.",
        )
    seconds = measured_step_seconds(read_metrics(Path(run.run_folder) / METRICS_FILE))
    if seconds is None:
        raise UserError(
            f"{name} has no two figures of speed.",
            "the first step warms up, so that one more is needed.",
            "let it run for some steps more, with track.every_steps 1.",
        )
    terms = Terms(find_gpu(run.predicted.gpu)) if run.predicted is not None else Terms()
    manifest = read_data_manifest(Path(run.data.folder)) if run.data is not None else None
    basis = basis_of(run.recipe, manifest, detect_hardware(), terms)
    case = None if isinstance(basis, Unknown) else estimate_plan(run, basis)
    if case is None:
        why = basis.reason if isinstance(basis, Unknown) else ""
        raise UserError(
            f"what {name} should have taken is not known: {why}.",
            "a measured step corrects the estimate of that very step.",
            "leave --calibrate out, or run the command where the run's GPUs and model are.",
        )
    return SpeedCorrection(seconds / case.step_seconds, f"{name}, {seconds:.2f} s a step measured")
