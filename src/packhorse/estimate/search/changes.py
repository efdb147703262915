"""The smallest changes that make a plan fit its GPUs, each with what it then needs and what it costs in speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from packhorse.durable import size
from packhorse.errors import UserError
from packhorse.estimate.case import Basis, Case, case_of
from packhorse.estimate.search.compare import Wanted, Way, checked_plan, fastest, ways, with_fields
from packhorse.plan.batch import smaller_micros
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest
from packhorse.recipe.load import override_recipe
from packhorse.recipe.schema import Engine, Recipe

SAME_RESULT: Final = "the same result"
ANOTHER_RESULT: Final = "another result"
SHARDING: Final[tuple[Engine, ...]] = ("zero1", "zero2", "fsdp2", "zero3")
OFFLOADING: Final[tuple[Engine, ...]] = ("zero3_offload",)
MOST_GPUS: Final = 1024
MOST_SHOWN: Final = 5


@dataclass(frozen=True)
class Change:
    """A change that makes the run fit.

    Attributes:
        words: In the recipe's fields, or flags of the command line.
        case: The plan with it.
        slower: Seconds of a step over those before, less 1.
        result: Whether the weights that come out are the same, and what else it asks for.
    """

    words: str
    case: Case
    slower: float
    result: str


def changes_that_fit(wanted: Wanted, case: Case) -> list[Change]:
    """One change of the system side; else several together; then other maths and more GPUs; the fastest of each first.

    Args:
        wanted: What was planned.
        case: Its plan, which does not fit.
    """
    basis, plan = case.basis, case.plan
    same = _fitting(_single(wanted, plan), wanted, basis, case, SAME_RESULT) or _together(wanted, basis, case)
    same.sort(key=lambda change: change.slower)
    other = _fitting(_other_maths(plan), wanted, basis, case, ANOTHER_RESULT)
    return [*same[:MOST_SHOWN], *other, *more_gpus(wanted, case)]


def more_gpus(wanted: Wanted, case: Case) -> list[Change]:
    """The fewest of the same GPUs that hold the run, under the engine that is then fastest."""
    # In other nodes, whose memory is not known.
    basis, count = replace(case.basis, host_bytes=None), case.plan.topology.world_size
    while (count := 2 * count) <= MOST_GPUS:
        more = replace(wanted, ask=DeviceRequest(count))
        best = fastest([way for way in _cheapest(more, basis) if way.case is not None and way.case.fits])
        if best is not None and best.case is not None:
            words = f"--gpus {count}x{case.basis.gpu.name} with {_words(_named(case.plan), best.case.plan.recipe)}"
            result = f"{SAME_RESULT}, {size(best.case.storage.host_bytes)} of host memory a node"
            return [Change(words.removesuffix(" with "), best.case, _slower(best.case, case), result)]
    return []


def _cheapest(wanted: Wanted, basis: Basis) -> list[Way]:
    return ways(wanted, basis, (*SHARDING, "ddp"), (True, False), 1)


def _single(wanted: Wanted, plan: RunPlan) -> Iterator[tuple[str, Recipe]]:
    """One change at a time."""
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
        # It needs as much of a GPU, and less of the host.
        yield "checkpoint.asynchronous=false", recipe.changed("checkpoint", asynchronous=False)
    for ranks in (2, 4, 8):
        if plan.topology.world_size % (ranks * plan.topology.sequence) == 0:
            yield f"parallel.sequence={ranks}", recipe.changed("parallel", sequence=ranks * plan.topology.sequence)


def _together(wanted: Wanted, basis: Basis, case: Case) -> list[Change]:
    """Engine, packs a pass and checkpointing together: the fastest on the devices, and the fastest with the host."""
    found: list[Change] = []
    # Copies for checkpoints may be what the host has no room for.
    waiting = replace(wanted, recipe=wanted.recipe.changed("checkpoint", asynchronous=False))
    on_devices: tuple[Engine, ...] = ("single", "ddp", *SHARDING)
    for each, engines in ((wanted, on_devices), (wanted, OFFLOADING), (waiting, OFFLOADING)):
        if each is waiting and (basis.host_bytes is None or found):
            break
        tried = ways(each, basis, engines, (True, False), None)
        best = fastest([way for way in tried if way.case is not None and way.case.fits])
        if best is not None and best.case is not None:
            words = _words(_named(case.plan), best.case.plan.recipe)
            found.append(Change(words, best.case, _slower(best.case, case), _result(best.case, case, SAME_RESULT)))
    return found


def _other_maths(plan: RunPlan) -> Iterator[tuple[str, Recipe]]:
    """What trains fewer weights, or keeps less of each; what comes out is another model."""
    recipe, kind = _named(plan), plan.recipe.method.kind
    if recipe.method.trains_base:
        yield from _override(recipe, "optimizer.name=adamw_8bit")
        yield from _override(recipe, "method=lora")
    if kind in ("full", "partial", "lora"):
        yield from _override(recipe, "method=qlora")
    if plan.batch.length_tokens >= 1024:
        yield from _override(recipe, f"batch.length={plan.batch.length_tokens // 2}")


def _override(recipe: Recipe, words: str) -> Iterator[tuple[str, Recipe]]:
    try:
        yield words, override_recipe(recipe, [words])
    except UserError:
        return


def _fitting(
    changed: Iterator[tuple[str, Recipe]], wanted: Wanted, basis: Basis, before: Case, result: str
) -> list[Change]:
    found = []
    for words, recipe in changed:
        try:
            plan = checked_plan(recipe, wanted)
        except UserError:
            continue
        length = replace(basis, packs=type(basis.packs).full(recipe.batch.length), validation=None)
        shorter = recipe.batch.length != before.plan.batch.length_tokens
        case = case_of(plan, length if shorter else basis)
        if case is not None and case.fits:
            found.append(Change(words, case, _slower(case, before), _result(case, before, result)))
    return found


def _named(plan: RunPlan) -> Recipe:
    """The recipe with what was chosen for it."""
    return plan.recipe.changed("batch", micro=plan.batch.micro_packs)


def _slower(case: Case, before: Case) -> float:
    """Of the same number of tokens."""
    return before.speed.tokens_per_second_per_gpu / case.speed.tokens_per_second_per_gpu - 1


def _result(case: Case, before: Case, result: str) -> str:
    """What comes out, and what is asked of the host where the device's burden moves there."""
    host = case.storage.host_bytes
    if case.plan.topology.engine not in OFFLOADING and not case.plan.recipe.parallel.offload_activations:
        return result
    more = host - before.storage.host_bytes
    return f"{result}, {size(host)} of host memory a node ({'+' if more >= 0 else '-'}{size(abs(more))})"


def _words(before: Recipe, after: Recipe) -> str:
    pairs: Sequence[tuple[str, Any, Any]] = (
        ("parallel.engine", before.parallel.engine, after.parallel.engine),
        ("batch.micro", before.batch.micro, after.batch.micro),
        ("parallel.checkpointing", before.parallel.checkpointing, after.parallel.checkpointing),
        ("checkpoint.asynchronous", before.checkpoint.asynchronous, after.checkpoint.asynchronous),
    )
    return " ".join(f"{name}={str(new).lower()}" for name, old, new in pairs if old != new)
