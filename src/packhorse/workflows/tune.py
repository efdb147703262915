"""Measured comparison of settings that change speed and memory but not the maths: short runs on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

from packhorse.errors import EXIT_OK, EXIT_STOPPED, UserError
from packhorse.plan.make_plan import run_folder_of
from packhorse.plan.run_plan import RunPlan, read_plan
from packhorse.plan.topology import detect_hardware
from packhorse.recipe.load import overridden_fields, override_recipe
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import METRICS_FILE, PLAN_FILE
from packhorse.run_folder.metrics import read_metrics
from packhorse.workflows.new_run import Reporter, create_run_here, launch_here
from packhorse.workflows.prepare import Prepare, manifest_of_prepared

STEPS: Final = 20
SAME_SPEED: Final = 0.02
"""Candidates whose speeds differ by less count as equally fast."""
SAME_LOSS: Final = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Largest relative difference of a step's loss by precision; the parity probe allows the same."""

Candidate = tuple[str, ...]
"""Overrides of the recipe; empty for the recipe unchanged."""


@dataclass(frozen=True)
class Trial:
    """What one candidate was measured to need.

    Attributes:
        overrides: Overrides of the recipe; empty for the recipe unchanged.
        tokens_per_second: Median of the second half of the steps, over all GPUs; None if it did not run.
        peak_bytes: Peak memory of rank 0: of the GPU, on a CPU of the process.
        first_step_seconds: Seconds of the first step; compiling is a part of it.
        losses: Loss of each step.
        loss_difference: Largest relative difference of a step's loss from that of the first candidate.
        why_not: Why it did not run; empty if it did.
    """

    overrides: Candidate
    tokens_per_second: float | None = None
    peak_bytes: float | None = None
    first_step_seconds: float | None = None
    losses: tuple[float, ...] = ()
    loss_difference: float | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Tuning:
    """Result of a comparison.

    Attributes:
        trials: The recipe unchanged, then every candidate.
        best: Overrides to take; empty if no candidate is faster with the same loss.
        exit_code: One of `packhorse.errors`: stopped if the user stopped it.
    """

    trials: tuple[Trial, ...]
    best: Candidate
    exit_code: int = EXIT_OK


def default_candidates(recipe: Recipe, on_gpu: bool) -> list[Candidate]:
    """Return the single changes that are tried: compiled layers, checkpointing, and on GPUs the other attention."""
    parallel = recipe.parallel
    found = [f"parallel.compile={'false' if parallel.compile is not False else 'true'}"]
    checkpointings = ("false", "4", "2", "true") if on_gpu else ("false", "true")
    now = str(parallel.checkpointing).lower()
    found += [f"parallel.checkpointing={value}" for value in checkpointings if value != now]
    if on_gpu and recipe.precision != "fp32":
        found.append(f"model.attention={'varlen' if recipe.model.attention == 'sdpa' else 'sdpa'}")
    return [(text,) for text in found]


def tune(
    recipe: Recipe,
    candidates: Sequence[Candidate] = (),
    steps: int = STEPS,
    gpus: int | None = None,
    prepare: Prepare = manifest_of_prepared,
    reporter: Reporter = Reporter(),  # noqa: B008
) -> Tuning:
    """Train some steps of each candidate on the same packs, and compare speed, memory and loss.

    Args:
        recipe: Recipe of one run.
        candidates: Overrides to try; empty for `default_candidates`, then the fastest of them together.
        steps: Steps of each candidate.
        gpus: Number of processes, one per GPU.
        prepare: Prepares the data if it is not prepared.
        reporter: Where progress is reported.

    Raises:
        UserError: The recipe unchanged does not run here, or a candidate changes no field of the recipe.
    """
    single = list(candidates) or default_candidates(recipe, bool(detect_hardware().gpus))
    for overrides in single:
        override_recipe(recipe, overrides)
    trials: list[Trial] = []

    def run(overrides: Candidate) -> bool:
        reporter.info(f"candidate {len(trials) + 1}: {' '.join(overrides) or 'the recipe unchanged'}")
        trial, code = _measured(recipe, overrides, len(trials) + 1, steps, gpus, prepare, reporter)
        trials.append(replace(trial, loss_difference=_difference(trial, trials[0] if trials else trial)))
        return code != EXIT_STOPPED

    for overrides in ((), *single):
        if not run(overrides):
            return Tuning(tuple(trials), (), EXIT_STOPPED)
    together = _together(trials, recipe.precision) if not candidates else ()
    if len(together) > 1 and not run(together):
        return Tuning(tuple(trials), (), EXIT_STOPPED)
    return Tuning(tuple(trials), _best(trials, recipe.precision))


def _measured(
    recipe: Recipe,
    overrides: Candidate,
    number: int,
    steps: int,
    gpus: int | None,
    prepare: Prepare,
    reporter: Reporter,
) -> tuple[Trial, int]:
    """Run a candidate and return its figures and its exit code."""
    short = _short(override_recipe(recipe, overrides), f"{recipe.name}-tune-{number}", steps)
    folder = run_folder_of(short)
    _remove_trial(folder)

    def made() -> RunPlan:
        return create_run_here(short, gpus, prepare=prepare, is_trial=True)

    try:
        end = launch_here(made, None, 0, replace(reporter, info=lambda line: None))
    except UserError as error:
        if not overrides:
            raise
        return Trial(overrides, why_not=error.mistakes[0].fact), EXIT_OK
    if end.exit_code == EXIT_OK:
        trial = _figures(overrides, folder)
        _remove_trial(folder)
        return trial, EXIT_OK
    if not overrides and end.exit_code != EXIT_STOPPED:
        raise UserError(
            f"the recipe unchanged did not train {steps} steps here: {_headline(end.message)}",
            "every candidate is compared with it.",
            f"see {relative(folder)}/logs, or choose another recipe.",
        )
    return Trial(overrides, why_not=f"{_headline(end.message)}; see {relative(folder)}/logs"), end.exit_code


def _headline(message: str) -> str:
    return next(iter(message.splitlines()), "stopped")


def _short(recipe: Recipe, name: str, steps: int) -> Recipe:
    """Return the recipe of a trial: few steps, each of them logged, in no tracker."""
    track = recipe.track.model_copy(update={"every_steps": 1, "wandb": "off", "tensorboard": False})
    recovery = recipe.recovery.model_copy(update={"on_oom": "stop"})
    schedule = recipe.schedule.model_copy(update={"warmup_steps": None})
    fields = {"name": name, "steps": steps, "epochs": None, "track": track, "recovery": recovery, "schedule": schedule}
    return recipe.model_copy(update=fields)


def _remove_trial(folder: Path) -> None:
    """Remove the folder of an earlier trial; another run of that name is refused when the trial is created."""
    if (folder / PLAN_FILE).is_file() and read_plan(folder).is_trial:
        shutil.rmtree(folder)


def _figures(overrides: Candidate, folder: Path) -> Trial:
    lines = [line for line in read_metrics(folder / METRICS_FILE) if "speed/tokens_per_second" in line]
    measured = lines[len(lines) // 2 :]
    return Trial(
        overrides,
        tokens_per_second=median(line["speed/tokens_per_second"] for line in measured),
        peak_bytes=lines[-1]["memory/peak_bytes"],
        first_step_seconds=lines[0]["speed/step_seconds"],
        losses=tuple(line["train/loss"] for line in lines),
    )


def _difference(trial: Trial, first: Trial) -> float | None:
    pairs = list(zip(trial.losses, first.losses, strict=False))
    return max((abs(one - other) / max(abs(other), 1e-12) for one, other in pairs), default=None)


def _good(trials: Sequence[Trial], precision: str) -> Iterator[tuple[float, Trial]]:
    """Yield speed and trial of the candidates that are faster than the first one, with the same loss."""
    least = (trials[0].tokens_per_second or 0.0) * (1 + SAME_SPEED)
    for trial in trials[1:]:
        same = trial.loss_difference is not None and trial.loss_difference <= SAME_LOSS[precision]
        if trial.tokens_per_second is not None and trial.tokens_per_second >= least and same:
            yield trial.tokens_per_second, trial


def _best(trials: Sequence[Trial], precision: str) -> Candidate:
    return max(_good(trials, precision), key=lambda pair: pair[0], default=(0.0, trials[0]))[1].overrides


def _together(trials: Sequence[Trial], precision: str) -> Candidate:
    """Return the fastest value of each field whose change was faster."""
    fastest: dict[str, tuple[float, str]] = {}
    for speed, trial in _good(trials, precision):
        (field,), (text,) = overridden_fields(trial.overrides), trial.overrides
        fastest[field] = max(fastest.get(field, (0.0, "")), (speed, text))
    return tuple(text for _, text in fastest.values())
