"""Every way to run a recipe on the same GPUs: engines x packs a pass x checkpointing. None changes the maths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from packhorse.durable import size
from packhorse.errors import UserError
from packhorse.estimate.case import MARGIN, Basis, Case, case_of
from packhorse.plan.compatibility import ENGINES
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware, choose_topology
from packhorse.recipe.rules.training import rule_findings
from packhorse.recipe.schema import Engine, ParallelSection, Recipe

Checkpointing = bool | int

MOST_TOKENS: Final = 65_536
"""Tokens a pass beyond which nothing is gained: products are as wide as they need be."""
LAST: Final[tuple[Engine, ...]] = ("zero3_offload",)
"""Engines that are chosen only where no other fits: they fill the host's memory, and are slow where it is."""
BY_NAME: Final[tuple[Engine, ...]] = ("zero3_nvme",)
"""Engines that are never chosen: what local disk a node has is not known, and a run cannot go on from one."""
SAME_SPEED: Final = 0.02
"""Differences below this are none: what takes less memory or shards less wins then."""


@dataclass(frozen=True)
class Wanted:
    """What is to be planned.

    Attributes:
        recipe: What to learn.
        ask: GPUs and nodes.
        here: This machine.
        data: The prepared data, if it is.
    """

    recipe: Recipe
    ask: DeviceRequest
    here: Hardware
    data: DataFacts | None


@dataclass(frozen=True)
class Way:
    """One way to run the recipe.

    Attributes:
        engine: How weights and states are shared.
        micro: Packs a pass; None where the engine itself is refused.
        checkpointing: As in the recipe.
        case: Its plan and costs; None where it is refused.
        error: Why it is.
    """

    engine: Engine
    micro: int | None
    checkpointing: Checkpointing
    case: Case | None
    error: UserError | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Simpler ways first."""
        return ENGINES.index(self.engine), int(self.checkpointing != 0), self.micro or 0


def every_way(wanted: Wanted, basis: Basis) -> list[Way]:
    """All that `--compare` shows."""
    return ways(wanted, basis, ENGINES, (False, True), None)


def ways(
    wanted: Wanted,
    basis: Basis,
    engines: Sequence[Engine],
    checkpointings: Sequence[Checkpointing],
    micro: int | None,
) -> list[Way]:
    """Plans each combination.

    Args:
        wanted: What is planned.
        basis: What it is estimated on.
        engines: To try.
        checkpointings: To try.
        micro: Packs a pass; None tries every number that divides a process's share.
    """
    found: list[Way] = []
    for engine in engines:
        sizes = [micro] if micro is not None else _sizes(wanted, engine)
        if isinstance(sizes, UserError):
            found.append(Way(engine, None, False, None, sizes))
            continue
        tried = [_way(wanted, basis, engine, size, again) for again in checkpointings for size in sizes]
        # What refuses them all is told once.
        refused = {str(way.error) for way in tried if way.case is None}
        if len(refused) == 1 and all(way.case is None for way in tried):
            tried = [Way(engine, None, False, None, tried[0].error)]
        found += tried
    return found


def fastest(found: Sequence[Way]) -> Way | None:
    """The fastest that fits with a margin, else the fastest that fits, else the one that needs least; None without any.

    Among equally fast ones the simplest; the choice depends on nothing but the figures.
    """
    possible = [way for way in found if way.case is not None]
    comfortable = [way for way in possible if way.case is not None and way.case.is_comfortable]
    for fitting in (comfortable, [way for way in possible if way.case is not None and way.case.fits]):
        if fitting:
            best = min(_seconds(way) for way in fitting)
            return min((way for way in fitting if _seconds(way) <= best * (1 + SAME_SPEED)), key=lambda way: way.order)
    return min(possible, key=lambda way: (_required(way), way.order), default=None)


def chosen_of(found: Sequence[Way]) -> Way | None:
    """What `auto` takes of all ways: the fastest without the host's memory, else with it; None without any."""
    plain = fastest([way for way in found if way.engine not in (*LAST, *BY_NAME)])
    if plain is not None and plain.case is not None and plain.case.fits:
        return plain
    offloaded = [way for way in found if way.engine in LAST and way.case is not None and way.case.fits]
    return fastest(offloaded) or plain


def why_not(way: Way, winner: Way) -> str:
    """Why a way is not the one to take; empty for the winner itself."""
    if way.case is None:
        assert way.error is not None
        return way.error.mistakes[0].why
    if way == winner:
        return ""
    case, best = way.case, winner.case
    assert best is not None
    if case.margin < 0:
        return f"does not fit: {-case.margin * case.basis.gpu.memory_bytes / 2**30:.1f} GiB too much"
    if not case.host_fits:
        return f"does not fit the host: {host_words(case)}"
    said = []
    if way.engine in BY_NAME:
        said.append("taken by name only")
    elif way.engine in LAST and winner.engine not in LAST:
        said.append(f"taken only where nothing else fits: {host_words(case)}")
    if not case.is_comfortable:
        said.append(f"leaves {case.margin:.1%}, less than {MARGIN:.0%}")
    slower = case.step_seconds / best.step_seconds - 1
    if slower > SAME_SPEED:
        said.append(f"{slower:.0%} slower: {_where(case, best)}")
    return ", ".join(said) or f"as fast ({slower:+.1%}), less simple"


def host_words(case: Case) -> str:
    """Memory of a node that the plan needs, and what there is."""
    known = case.basis.host_bytes
    there = "; what it has is not known here" if known is None else f", which has {size(known)}"
    return f"{size(case.storage.host_bytes)} of host memory a node{there}"


def _where(case: Case, best: Case) -> str:
    """The part of a step that grew most."""
    before = {part.name: part.seconds for part in best.speed.parts}
    return max(case.speed.parts, key=lambda part: part.seconds - before.get(part.name, 0.0)).name


def with_fields(recipe: Recipe, engine: Engine, micro: int, checkpointing: Checkpointing) -> Recipe:
    """The recipe with these fields; what belongs to another engine is left out."""
    return recipe.changed("batch", micro=micro).changed(
        "parallel",
        engine=engine,
        checkpointing=checkpointing,
        shard_group=recipe.parallel.shard_group if engine == "hsdp" else None,
        nvme=recipe.parallel.nvme if engine == "zero3_nvme" else None,
        offload_activations=recipe.parallel.offload_activations and checkpointing is not False,
    )


def checked_plan(recipe: Recipe, wanted: Wanted) -> RunPlan:
    """The plan of a recipe that was changed here.

    Raises:
        UserError: It breaks a rule, or cannot be planned.
    """
    for finding in rule_findings(recipe):
        raise UserError(finding.fact, finding.why, finding.fix)
    return make_plan(recipe, wanted.ask, wanted.here, wanted.data)


def _way(wanted: Wanted, basis: Basis, engine: Engine, micro: int, checkpointing: Checkpointing) -> Way:
    try:
        plan = checked_plan(with_fields(wanted.recipe, engine, micro, checkpointing), wanted)
    except UserError as error:
        return Way(engine, micro, checkpointing, None, error)
    case = case_of(plan, basis)
    assert case is not None, "a basis is only made where the weights are known"
    return Way(engine, micro, checkpointing, case)


def _sizes(wanted: Wanted, engine: Engine) -> list[int] | UserError:
    """Packs a pass that divide a process's share; or why the engine has no such processes."""
    parallel: ParallelSection = with_fields(wanted.recipe, engine, 1, False).parallel
    try:
        topology, _ = choose_topology(parallel, wanted.ask, wanted.here)
    except UserError as error:
        return error
    batch = wanted.recipe.batch
    if batch.packs % topology.data_ranks:
        return [1]  # which is refused when it is planned
    share = batch.packs // topology.data_ranks
    most = max(1, MOST_TOKENS * topology.sequence // batch.length)
    return list(_divisors(share, most))


def _divisors(number: int, most: int) -> Iterator[int]:
    yield from (size for size in range(1, min(number, most) + 1) if number % size == 0)


def _seconds(way: Way) -> float:
    assert way.case is not None
    return way.case.step_seconds


def _required(way: Way) -> int:
    assert way.case is not None
    return way.case.required_bytes
