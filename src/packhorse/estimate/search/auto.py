"""Automatic choices: the fastest candidate that fits with a margin, and the least hardware that a run fits on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.plan_estimate import MARGIN, EstimateInputs, PlanEstimate, estimate_plan
from packhorse.estimate.search.candidates import (
    BY_NAME,
    CHECKPOINTINGS,
    LAST,
    SAME_SPEED,
    Candidate,
    Checkpointing,
    SearchRequest,
    automatic_choice,
    fastest,
    host_memory_text,
    plan_candidates,
)
from packhorse.plan.compatibility import ENGINES
from packhorse.plan.gpu_support import AMPERE
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import Decision, RunPlan
from packhorse.plan.topology import DeviceRequest
from packhorse.recipe.schema import Engine, Recipe

GIB: Final = 2**30
MOST_GPUS: Final = 1024
ONE_GPU: Final[tuple[Engine, ...]] = ("single",)
SEVERAL_GPUS: Final[tuple[Engine, ...]] = ("ddp", "zero2", "zero3", "fsdp2")


def plan_best(request: SearchRequest, basis: EstimateInputs | None) -> RunPlan:
    """Return the plan, with `auto` fields chosen by their cost, and with its predicted memory and time.

    Args:
        request: What is planned.
        basis: Shape, packs and GPU; None where one of them is not known: `make_plan` then chooses.

    Raises:
        UserError: The recipe cannot be planned (see `make_plan`).
    """
    recipe = request.recipe
    if basis is None or not automatic_fields(recipe):
        plan = make_plan(recipe, request.ask, request.here, request.data)
        if basis is None:
            return plan
        case = estimate_plan(plan, basis)
        assert case is not None, "inputs exist only where the weights are known"
        return case.predicted_plan()
    found = _candidates(request, basis)
    best = automatic_choice(found) if recipe.parallel.engine == "auto" else fastest(found)
    if best is None:
        raise refusal(found)
    assert best.case is not None
    return _explained(best, best.case, found, recipe)


def refusal(found: Sequence[Candidate]) -> Exception:
    """Return the error to raise where every candidate is refused."""
    # That one process is too few for one engine, and several too many for another, is not the user's mistake.
    errors = {each.engine: each.error for each in found if each.error is not None}
    return errors.get("ddp") or next(iter(errors.values()))


def automatic_fields(recipe: Recipe) -> tuple[str, ...]:
    """Return the fields that the plan chooses by their cost."""
    fields = {
        "parallel.engine": recipe.parallel.engine,
        "parallel.checkpointing": recipe.parallel.checkpointing,
        "batch.micro": recipe.batch.micro,
    }
    return tuple(name for name, value in fields.items() if value == "auto")


def _candidates(request: SearchRequest, basis: EstimateInputs) -> list[Candidate]:
    """Return every candidate that may be chosen; those that use the host's memory only where no other fits."""
    recipe, engine = request.recipe, request.recipe.parallel.engine
    checkpointing = recipe.parallel.checkpointing
    checkpointings: Sequence[Checkpointing] = [checkpointing] if checkpointing != "auto" else CHECKPOINTINGS
    if checkpointing == "auto" and recipe.parallel.offload_activations:
        checkpointings = [True]  # only inputs of recomputed layers are offloaded
    micro = None if recipe.batch.micro == "auto" else recipe.batch.micro
    if engine != "auto":
        return plan_candidates(request, basis, [engine], checkpointings, micro)
    plain = [each for each in ENGINES if each not in (*LAST, *BY_NAME)]
    found = plan_candidates(request, basis, plain, checkpointings, micro)
    if any(each.case is not None and each.case.fits for each in found):
        return found
    return [*found, *plan_candidates(request, basis, LAST, checkpointings, micro)]


def _explained(best: Candidate, case: PlanEstimate, found: Sequence[Candidate], recipe: Recipe) -> RunPlan:
    """Return the winner's plan with the reason of each choice; `batch.micro` stays `auto`, for other GPUs later."""
    fields = automatic_fields(recipe)
    plan, reason = case.predicted_plan(), _reason(best, case, found)
    decisions = list(plan.decisions)
    if "batch.micro" in fields:
        batch = plan.batch
        value = f"{batch.micro_packs} packs a pass, {batch.accumulation_steps} passes a step"
        index = next(index for index, each in enumerate(decisions) if each.name == "batch.micro")
        decisions[index] = Decision(name="batch.micro", value=value, reason=reason)
        plan = plan.model_copy(update={"recipe": plan.recipe.changed("batch", micro="auto")})
    values = {"parallel.engine": str(best.engine), "parallel.checkpointing": str(best.checkpointing).lower()}
    decisions += [Decision(name=name, value=value, reason=reason) for name, value in values.items() if name in fields]
    return plan.model_copy(update={"decisions": tuple(decisions)})


def _reason(best: Candidate, case: PlanEstimate, found: Sequence[Candidate]) -> str:
    card = case.basis.gpu
    memory = f"{case.required_bytes / GIB:.1f} of {card.memory_bytes / GIB:.1f} GiB of {card.name}"
    tried = [each.case for each in found if each.case is not None]
    fitting = [each for each in tried if each.is_comfortable]
    if not case.fits:
        host = "" if case.host_fits else f", and {host_memory_text(case)}"
        return f"none of {len(tried)} candidates fits; this one needs least, {memory}{host}"
    if best.engine in LAST and any(each.engine not in LAST for each in found):
        return f"nothing else fits: weights and optimizer states go to the host, {host_memory_text(case)}; {memory}"
    if not case.is_comfortable:
        least = f"none of {len(tried)} candidates leaves {MARGIN:.0%} of the card free"
        return f"{least}; this is the fastest that fits, {memory}"
    if len(tried) == 1:
        return f"the only candidate; {memory}"
    if len(fitting) == 1:
        return f"the only one of {len(tried)} candidates that fits with {MARGIN:.0%} to spare: {memory}"
    slowest = max(each.step_seconds for each in fitting) / case.step_seconds - 1
    rest = f", the others up to {slowest:.0%} slower" if slowest > SAME_SPEED else ", the others as fast"
    number = f"{len(fitting)} candidates that fit with {MARGIN:.0%} to spare ({len(tried)} tried)"
    return f"the fastest of {number}: {memory}{rest}"


# --- the least hardware -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeastHardware:
    """The fewest GPUs of one kind.

    Attributes:
        gpu: Kind of GPU.
        count: Number of GPUs; None where not even `MOST_GPUS` are enough.
        way: The fastest candidate on that number.
        refused: What the packs or the model prevent, where not even the most GPUs are enough.
    """

    gpu: GpuProfile
    count: int | None
    way: Candidate | None
    refused: str = ""


def least_hardware(request: SearchRequest, basis: EstimateInputs, gpus: Sequence[GpuProfile]) -> list[LeastHardware]:
    """Return for each kind the fewest GPUs (1, 2, 4, 8 ...) that the run fits on with a margin, least memory first."""
    # The kernel, and whether a precision exists, depend on the compute capability.
    by_capability: dict[float | None, list[GpuProfile]] = {}
    for gpu in gpus:
        old = gpu.compute_capability is not None and gpu.compute_capability < AMPERE
        by_capability.setdefault(gpu.compute_capability if old else None, []).append(gpu)
    found = [
        least for capability, alike in by_capability.items() for least in _fewest(request, basis, alike, capability)
    ]
    return sorted(found, key=_order)


def _order(least: LeastHardware) -> tuple[bool, int, str]:
    return least.count is None, (least.count or 0) * least.gpu.memory_bytes, least.gpu.name


def _fewest(
    request: SearchRequest, basis: EstimateInputs, gpus: Sequence[GpuProfile], capability: float | None
) -> list[LeastHardware]:
    """Return the fewest GPUs of each kind; all have the compute capability, or None."""
    found: list[LeastHardware] = []
    missing, refused, count = list(gpus), "", 1
    while missing and count <= MOST_GPUS and not refused:
        engines = ONE_GPU if count == 1 else SEVERAL_GPUS
        asked = replace(request, ask=DeviceRequest(count, capability=capability))
        tried = plan_candidates(asked, basis, engines, (False, True), None)
        errors = [each.error for each in tried if each.error is not None]
        if len(errors) == len(tried):
            refused = errors[-1].mistakes[0].fact
        for gpu in list(missing):
            best = _best_on(gpu, tried)
            if best is not None:
                found.append(LeastHardware(gpu, count, best))
                missing.remove(gpu)
        count *= 2
    return [*found, *(LeastHardware(gpu, None, None, refused) for gpu in missing)]


def _best_on(gpu: GpuProfile, tried: Sequence[Candidate]) -> Candidate | None:
    """Return the fastest that fits; per engine only the largest pass, which is never slower than a smaller one."""
    largest: dict[tuple[Engine, Checkpointing], Candidate] = {}
    for candidate in tried:
        case = candidate.case.on(gpu) if candidate.case is not None else None
        if case is not None and case.is_comfortable:
            largest[candidate.engine, candidate.checkpointing] = replace(candidate, case=case)
    return fastest(list(largest.values()))
