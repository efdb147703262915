"""The smallest changes that make a plan fit its GPUs, with the memory and speed after each; refusal of the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from packhorse.durable import size
from packhorse.errors import UserError
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate, estimate_plan
from packhorse.estimate.search.candidates import (
    Candidate,
    SearchRequest,
    checked_plan,
    fastest_fitting,
    host_memory_text,
    plan_candidates,
    with_fields,
)
from packhorse.estimate.training_state import Component
from packhorse.plan.batch import smaller_micros
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest
from packhorse.recipe.load import override_recipe
from packhorse.recipe.schema import Engine, Recipe

GIB: Final = 2**30
SAME_RESULT: Final = "the same result"
ANOTHER_RESULT: Final = "another result"
SHARDING: Final[tuple[Engine, ...]] = ("zero1", "zero2", "fsdp2", "zero3")
OFFLOADING: Final[tuple[Engine, ...]] = ("zero3_offload",)
MOST_GPUS: Final = 1024
MOST_SHOWN: Final = 5
MOST_NAMED: Final = 3


@dataclass(frozen=True)
class Change:
    """A change that makes the run fit.

    Attributes:
        words: Fields of the recipe, or flags of the command line.
        case: Estimate of the changed plan.
        slower: Seconds of a step divided by those before, minus 1.
        result: Whether the trained weights are the same, and what the host needs.
    """

    words: str
    case: PlanEstimate
    slower: float
    result: str


def refuse_unfit(request: SearchRequest, case: PlanEstimate) -> None:
    """Refuse a plan that needs more memory than the card, or than the host where its memory is known.

    Raises:
        UserError: The plan does not fit; the message has the largest parts, and the changes that fit.
    """
    if case.fits:
        return
    fix = f"{_fix(changes_that_fit(request, case))}; or set --force if the estimate is wrong."
    if case.margin >= 0:
        largest = _largest(case.storage.host)
        raise UserError(f"the run needs {host_memory_text(case)}.", f"most of it: {largest}.", fix)
    card, peak = case.basis.gpu, case.memory.peak
    raise UserError(
        f"the run needs {case.required_bytes / GIB:.1f} GiB on each GPU, and {card.name} has"
        f" {card.memory_bytes / GIB:.1f} GiB.",
        f"most memory is needed in {peak.name}: {_largest(peak.components)}.",
        fix,
    )


def _largest(components: Sequence[Component]) -> str:
    parts = sorted(components, key=lambda part: -part.bytes)[:MOST_NAMED]
    return ", ".join(f"{part.name} {part.bytes / GIB:.1f} GiB" for part in parts)


def _fix(changes: list[Change]) -> str:
    if not changes:
        return "see `packhorse plan RECIPE --gpus auto` for the least hardware that the run fits on"
    texts = [
        f"{change.words} ({change.case.required_bytes / GIB:.1f} GiB, {1 / (1 + change.slower) - 1:+.0%} speed,"
        f" {change.result})"
        for change in changes[:MOST_NAMED]
    ]
    return f"set {', or '.join(texts)}"


def changes_that_fit(request: SearchRequest, case: PlanEstimate) -> list[Change]:
    """Return system changes (one field, otherwise several), then other maths, then more GPUs; the fastest first."""
    plan = case.plan
    same = _fitting(_single_changes(plan), request, case, SAME_RESULT) or _combined_changes(request, case)
    same.sort(key=lambda change: change.slower)
    other = _fitting(_other_maths(plan), request, case, ANOTHER_RESULT)
    return [*same[:MOST_SHOWN], *other, *more_gpus(request, case)]


def more_gpus(request: SearchRequest, case: PlanEstimate) -> list[Change]:
    """Return the fewest of the same GPUs that the run fits on, with the engine that is then fastest."""
    # Their nodes' memory is not known.
    basis, count = replace(case.basis, host_bytes=None), case.plan.topology.world_size
    while (count := 2 * count) <= MOST_GPUS:
        more = replace(request, ask=DeviceRequest(count, capability=request.ask.capability))
        best = fastest_fitting(_cheapest(more, basis))
        if best is not None:
            words = f"--gpus {count}x{case.basis.gpu.name} with {_words(_named(case.plan), best.plan.recipe)}"
            result = f"{SAME_RESULT}, {size(best.storage.host_bytes)} of host memory per node"
            return [Change(words.removesuffix(" with "), best, _slower(best, case), result)]
    return []


def _cheapest(request: SearchRequest, basis: EstimateInputs) -> list[Candidate]:
    return plan_candidates(request, basis, (*SHARDING, "ddp"), (True, False), 1)


def _single_changes(plan: RunPlan) -> Iterator[tuple[str, Recipe]]:
    recipe = _named(plan)
    parallel = recipe.parallel
    for smaller in smaller_micros(plan):
        yield f"batch.micro={smaller}", recipe.changed("batch", micro=smaller)
    if parallel.checkpointing is not True:
        yield "parallel.checkpointing=true", recipe.changed("parallel", checkpointing=True)
    if parallel.checkpointing is not False and not parallel.offload_activations:
        yield "parallel.offload_activations=true", recipe.changed("parallel", offload_activations=True)
    for engine in (*SHARDING, *OFFLOADING):
        if engine != plan.topology.engine:
            changed = with_fields(recipe, engine, plan.batch.micro_packs, parallel.checkpointing is not False)
            changed = changed.changed("parallel", checkpointing=parallel.checkpointing)
            yield f"parallel.engine={engine}", changed
    if recipe.checkpoint.asynchronous:
        # A GPU then needs as much, and the host less.
        yield "checkpoint.asynchronous=false", recipe.changed("checkpoint", asynchronous=False)
    for ranks in (2, 4, 8):
        if plan.topology.world_size % (ranks * plan.topology.sequence) == 0:
            yield f"parallel.sequence={ranks}", recipe.changed("parallel", sequence=ranks * plan.topology.sequence)


def _combined_changes(request: SearchRequest, case: PlanEstimate) -> list[Change]:
    """Return engine, packs per pass and checkpointing together: the fastest on the devices, and with the host."""
    found: list[Change] = []
    # The host may have no memory left for copies of checkpoints.
    synchronous = replace(request, recipe=request.recipe.changed("checkpoint", asynchronous=False))
    on_devices: tuple[Engine, ...] = ("single", "ddp", *SHARDING)
    for each, engines in ((request, on_devices), (request, OFFLOADING), (synchronous, OFFLOADING)):
        if each is synchronous and (case.basis.host_bytes is None or found):
            break
        best = fastest_fitting(plan_candidates(each, case.basis, engines, (True, False), None))
        if best is not None:
            words = _words(_named(case.plan), best.plan.recipe)
            found.append(Change(words, best, _slower(best, case), _result(best, case, SAME_RESULT)))
    return found


def _other_maths(plan: RunPlan) -> Iterator[tuple[str, Recipe]]:
    """Yield changes that train fewer weights, or keep less of each; the trained model is another one."""
    recipe, kind = _named(plan), plan.recipe.method.kind
    words = ["optimizer.name=adamw_8bit", "method=lora"] if recipe.method.trains_base else []
    words += ["method=qlora"] if kind in ("full", "partial", "lora") else []
    words += [f"batch.length={plan.batch.length_tokens // 2}"] if plan.batch.length_tokens >= 1024 else []
    for word in words:
        try:
            yield word, override_recipe(recipe, [word])
        except UserError:
            continue


def _fitting(
    changed: Iterator[tuple[str, Recipe]], request: SearchRequest, before: PlanEstimate, result: str
) -> list[Change]:
    found, basis = [], before.basis
    for words, recipe in changed:
        try:
            plan = checked_plan(recipe, request)
        except UserError:
            continue
        full = replace(basis, packs=type(basis.packs).full(recipe.batch.length), validation=None)
        shorter = recipe.batch.length != before.plan.batch.length_tokens
        case = estimate_plan(plan, full if shorter else basis)
        if case is not None and case.fits:
            found.append(Change(words, case, _slower(case, before), _result(case, before, result)))
    return found


def _named(plan: RunPlan) -> Recipe:
    """Return the recipe with the plan's own packs per pass."""
    return plan.recipe.changed("batch", micro=plan.batch.micro_packs)


def _slower(case: PlanEstimate, before: PlanEstimate) -> float:
    """Return the relative change of seconds for the same number of tokens."""
    return before.speed.tokens_per_second_per_gpu / case.speed.tokens_per_second_per_gpu - 1


def _result(case: PlanEstimate, before: PlanEstimate, result: str) -> str:
    """Return the result, with the host's memory where the change moves data from the device to the host."""
    host = case.storage.host_bytes
    if case.plan.topology.engine not in OFFLOADING and not case.plan.recipe.parallel.offload_activations:
        return result
    more = host - before.storage.host_bytes
    return f"{result}, {size(host)} of host memory per node ({'+' if more >= 0 else '-'}{size(abs(more))})"


def _words(before: Recipe, after: Recipe) -> str:
    pairs: Sequence[tuple[str, Any, Any]] = (
        ("parallel.engine", before.parallel.engine, after.parallel.engine),
        ("batch.micro", before.batch.micro, after.batch.micro),
        ("parallel.checkpointing", before.parallel.checkpointing, after.parallel.checkpointing),
        ("checkpoint.asynchronous", before.checkpoint.asynchronous, after.checkpoint.asynchronous),
    )
    return " ".join(f"{name}={str(new).lower()}" for name, old, new in pairs if old != new)
