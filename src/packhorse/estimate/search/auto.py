"""`auto`, where the GPUs are known: the fastest way that fits with a margin, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from packhorse.estimate.case import MARGIN, Basis, Case, case_of
from packhorse.estimate.search.compare import (
    BY_NAME,
    LAST,
    SAME_SPEED,
    Checkpointing,
    Wanted,
    Way,
    chosen_of,
    fastest,
    host_words,
    ways,
)
from packhorse.plan.batch import micro_words
from packhorse.plan.compatibility import ENGINES
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import Decision, RunPlan
from packhorse.recipe.schema import Engine, Recipe

GIB: Final = 2**30


def plan_best(wanted: Wanted, basis: Basis | None) -> RunPlan:
    """The plan, with what is `auto` chosen by its costs, and with what is predicted of it.

    Args:
        wanted: What is planned.
        basis: Shape, packs and GPU; None where one of them is not known, and `auto` is as `make_plan` has it.

    Raises:
        UserError: As `make_plan`.
    """
    if basis is None:
        return make_plan(wanted.recipe, wanted.ask, wanted.here, wanted.data)
    recipe = wanted.recipe
    if not automatic(recipe):
        case = case_of(make_plan(recipe, wanted.ask, wanted.here, wanted.data), basis)
        assert case is not None, "a basis is only made where the weights are known"
        return case.noted()
    found = _tried(wanted, basis)
    best = chosen_of(found) if recipe.parallel.engine == "auto" else fastest(found)
    if best is None:
        # That one process is too few for one engine, and several too many for another, is nobody's mistake.
        errors = {way.engine: way.error for way in found if way.error is not None}
        raise errors.get("ddp") or next(iter(errors.values()))
    assert best.case is not None
    return _explained(best, best.case, found, recipe)


def automatic(recipe: Recipe) -> tuple[str, ...]:
    """Fields that the plan chooses by their costs."""
    fields = {
        "parallel.engine": recipe.parallel.engine,
        "parallel.checkpointing": recipe.parallel.checkpointing,
        "batch.micro": recipe.batch.micro,
    }
    return tuple(name for name, value in fields.items() if value == "auto")


def _tried(wanted: Wanted, basis: Basis) -> list[Way]:
    """Every way that may be chosen; those that fill the host's memory only where no other fits."""
    recipe, asked = wanted.recipe, wanted.recipe.parallel.engine
    plain = [engine for engine in ENGINES if engine not in (*LAST, *BY_NAME)]

    def tried(engines: Sequence[Engine]) -> list[Way]:
        return ways(wanted, basis, engines, _checkpointings(recipe), _micro(recipe))

    if asked != "auto":
        return tried([asked])
    found = tried(plain)
    fits = any(way.case is not None and way.case.fits for way in found)
    return found if fits else [*found, *tried(LAST)]


def _checkpointings(recipe: Recipe) -> Sequence[Checkpointing]:
    asked = recipe.parallel.checkpointing
    if asked != "auto":
        return [asked]
    return [True] if recipe.parallel.offload_activations else [False, True]


def _micro(recipe: Recipe) -> int | None:
    return None if recipe.batch.micro == "auto" else recipe.batch.micro


def _explained(best: Way, case: Case, found: Sequence[Way], recipe: Recipe) -> RunPlan:
    """The winner's plan with the reason of each choice; `batch.micro` stays `auto`, for other GPUs later."""
    chosen = automatic(recipe)
    plan = case.noted()
    why = _why(best, case, found)
    decisions = list(plan.decisions)
    if "batch.micro" in chosen:
        at = next(index for index, each in enumerate(decisions) if each.name == "batch.micro")
        decisions[at] = Decision(name="batch.micro", value=micro_words(plan.batch), reason=why)
        plan = plan.model_copy(update={"recipe": plan.recipe.changed("batch", micro="auto")})
    values = {"parallel.engine": str(best.engine), "parallel.checkpointing": str(best.checkpointing).lower()}
    decisions += [Decision(name=name, value=value, reason=why) for name, value in values.items() if name in chosen]
    return plan.model_copy(update={"decisions": tuple(decisions)})


def _why(best: Way, case: Case, found: Sequence[Way]) -> str:
    card = case.basis.gpu
    memory = f"{case.required_bytes / GIB:.1f} of {card.memory_bytes / GIB:.1f} GiB of {card.name}"
    tried = [way.case for way in found if way.case is not None]
    fitting = [each for each in tried if each.is_comfortable]
    if not case.fits:
        host = "" if case.host_fits else f", and {host_words(case)}"
        return f"none of {len(tried)} ways fits; this one needs least, {memory}{host}"
    if best.engine in LAST and any(way.engine not in LAST for way in found):
        return f"nothing else fits: weights and optimizer states go to the host, {host_words(case)}; {memory}"
    if not case.is_comfortable:
        return (
            f"none of {len(tried)} ways leaves {MARGIN:.0%} of the card free; this is the fastest that fits, {memory}"
        )
    if len(tried) == 1:
        return f"the only way; {memory}"
    if len(fitting) == 1:
        return f"the only one of {len(tried)} ways that fits with {MARGIN:.0%} to spare: {memory}"
    slowest = max(each.step_seconds for each in fitting) / case.step_seconds - 1
    rest = f", the others up to {slowest:.0%} slower" if slowest > SAME_SPEED else ", the others as fast"
    return (
        f"the fastest of {len(fitting)} ways that fit with {MARGIN:.0%} to spare ({len(tried)} tried): {memory}{rest}"
    )
