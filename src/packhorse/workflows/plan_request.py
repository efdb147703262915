"""A recipe on requested GPUs: what is known about it, and the plan made from that. Nothing is prepared or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packhorse.data.data_manifest import DataManifest, read_data_manifest
from packhorse.errors import UserError
from packhorse.estimate.gpus import find_gpu, parse_gpus
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate, SpeedCorrection, estimate_plan
from packhorse.estimate.search.auto import plan_best
from packhorse.estimate.search.candidates import SearchRequest
from packhorse.estimate.search.changes import Change, changes_that_fit, refuse_unfit
from packhorse.estimate.speed import measured_step_seconds
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, detect_hardware
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.layout import METRICS_FILE
from packhorse.run_folder.metrics import read_metrics
from packhorse.workflows.early_checks import check_start
from packhorse.workflows.model_shape import Unknown
from packhorse.workflows.plan_basis import GpuTerms, basis_of, on_known_gpus, with_guess
from packhorse.workflows.prepared_data import facts_of, manifest_if_prepared
from packhorse.workflows.template_clock import refuse_clock


@dataclass(frozen=True)
class PlanRequest:
    """A recipe on GPUs that need not be present, with data that need not be prepared.

    Attributes:
        wanted: Recipe, data and GPUs.
        basis: What is known about model, packs and GPU, or what is missing.
        manifest: Manifest of the data, if it is prepared.
    """

    wanted: SearchRequest
    basis: EstimateInputs | Unknown
    manifest: DataManifest | None

    @property
    def vocab_size(self) -> int | None:
        """Size of the tokenizer, if the data is prepared."""
        return self.manifest.vocab_size if self.manifest is not None else None


@dataclass(frozen=True)
class PlanResult:
    """A plan and its estimates.

    Attributes:
        plan: The plan.
        case: Memory, time and disk of the plan; None if they are not known.
        unknown: Why they are not known; empty if they are.
        changes: Changes that make a plan fit that does not.
    """

    plan: RunPlan
    case: PlanEstimate | None
    unknown: str = ""
    changes: Sequence[Change] = ()


def plan_request(recipe: Recipe, ask: DeviceRequest, terms: GpuTerms) -> PlanRequest:
    """Look at this machine, at the shape of the model and for prepared data.

    Args:
        recipe: Recipe with its overrides.
        ask: Requested GPUs and nodes.
        terms: Statements of the user about the GPUs.

    Raises:
        UserError: The template writes the current date; or see `early_checks.check_start` and `plan_basis.basis_of`.
    """
    check_start(recipe)
    manifest, here = manifest_if_prepared(recipe), detect_hardware()
    if manifest is None:
        refuse_clock(recipe)
    facts = facts_of(recipe, manifest) if manifest is not None else None
    wanted = SearchRequest(recipe, on_known_gpus(ask, here, terms), here, facts)
    return PlanRequest(wanted, basis_of(recipe, manifest, here, terms), manifest)


def read_gpus(
    gpus: str, nodes: int | None, network_gbit: float | None = None, price: float | None = None
) -> tuple[DeviceRequest, GpuTerms]:
    """Return what `--gpus`, `--nodes`, `--network` and `--price` request.

    Raises:
        UserError: `--gpus` is not a number of GPUs, or names an unknown GPU.
    """
    count, gpu = parse_gpus(gpus) if gpus else (None, None)
    return DeviceRequest(count, nodes), GpuTerms(gpu, network_gbit, price)


def completed(request: PlanRequest, calibrate: str = "") -> PlanRequest:
    """Return the request with the number of packs guessed, and the time corrected by the measured steps of a run.

    Raises:
        UserError: The run that calibrates has too few measured steps, or its estimate is not known.
    """
    if isinstance(request.basis, Unknown):
        return request
    measured = measured_of(open_run(calibrate)) if calibrate else None
    return replace(request, basis=replace(with_guess(request.basis, request.wanted.recipe), measured=measured))


def plan_with_estimates(request: PlanRequest, *, find_changes: bool = True) -> PlanResult:
    """Return the best plan of a request, its estimates, and what would make it fit if it does not.

    Raises:
        UserError: The recipe cannot run on the requested GPUs.
    """
    if isinstance(request.basis, Unknown):
        return PlanResult(plan_best(request.wanted, None), None, request.basis.reason)
    plan = plan_best(request.wanted, request.basis)
    case = estimate_plan(plan, request.basis)
    needs_changes = find_changes and case is not None and not case.fits
    return PlanResult(plan, case, changes=changes_that_fit(request.wanted, case) if needs_changes and case else ())


def draft_plan(wanted: SearchRequest, basis: EstimateInputs | Unknown, force: bool) -> RunPlan:
    """Return the plan before the data is prepared.

    Raises:
        UserError: Weights and optimizer states alone exceed the GPUs, or see `auto.plan_best`.
    """
    if isinstance(basis, Unknown):
        return plan_best(wanted, None)
    least = replace(basis, packs=PackFigures.full(1))
    plan = plan_best(wanted, least)
    # The message shows the figures of whole packs, which need more.
    return plan if force or PlanEstimate(plan, least).fits else fitting_plan(wanted, basis, force)


def fitting_plan(wanted: SearchRequest, basis: EstimateInputs | Unknown, force: bool) -> RunPlan:
    """Return the plan.

    Raises:
        UserError: It is known that the GPUs cannot hold the plan, or see `auto.plan_best`.
    """
    if isinstance(basis, Unknown):
        return plan_best(wanted, None)
    plan = plan_best(wanted, basis)
    if not force:
        refuse_unfit(wanted, PlanEstimate(plan, basis))
    return plan


def measured_of(run: RunPlan) -> SpeedCorrection:
    """Return measured over predicted seconds of a step of a run.

    Raises:
        UserError: The run did not train on known GPUs, or has too few measured steps.
    """
    name = relative(run.run_folder)
    if run.topology.device == "cpu":
        raise UserError(
            f"{name} ran on a CPU.",
            "step times of a CPU do not calibrate a GPU.",
            "remove --calibrate, or name a run that trained on GPUs.",
        )
    seconds = measured_step_seconds(read_metrics(Path(run.run_folder) / METRICS_FILE))
    if seconds is None:
        raise UserError(
            f"{name} has fewer than two measured steps.",
            "the first measured step includes the warm-up, so one more is needed.",
            "let it run for some more steps, with track.every_steps 1.",
        )
    terms = GpuTerms(find_gpu(run.predicted.gpu)) if run.predicted is not None else GpuTerms()
    manifest = read_data_manifest(Path(run.data.folder)) if run.data is not None else None
    basis = basis_of(run.recipe, manifest, detect_hardware(), terms)
    case = None if isinstance(basis, Unknown) else estimate_plan(run, basis)
    if case is None:
        reason = basis.reason if isinstance(basis, Unknown) else "its model cannot be counted"
        raise UserError(
            f"the step time of {name} cannot be predicted: {reason}.",
            "a measured step corrects the prediction of the same step.",
            "remove --calibrate, or run the command where the GPUs and the model of the run are.",
        )
    return SpeedCorrection(seconds / case.step_seconds, f"{name}, {seconds:.2f} s per step measured")
