"""All candidates for running a recipe on the same GPUs: engines x packs per pass x checkpointing.

No candidate changes the maths of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from packhorse.durable import size
from packhorse.errors import UserError
from packhorse.estimate.plan_estimate import MARGIN, EstimateInputs, PlanEstimate, estimate_plan
from packhorse.plan.compatibility import ENGINES
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware, choose_topology
from packhorse.recipe.rules.training import rule_findings
from packhorse.recipe.schema import Engine, ParallelSection, Recipe

Checkpointing = bool | int | Literal["selective"]
CHECKPOINTINGS: Final[tuple[Checkpointing, ...]] = (False, 4, 3, 2, "selective", True)
"""Values of `parallel.checkpointing` that are tried, from no recomputation to that of every layer."""

MOST_TOKENS: Final = 65_536
"""Tokens per pass beyond which matrix products do not get faster."""
LAST: Final[tuple[Engine, ...]] = ("zero3_offload",)
"""Engines that are chosen only where no other fits: they fill the host's memory and are slow."""
BY_NAME: Final[tuple[Engine, ...]] = ("zero3_nvme",)
"""Engines that are never chosen: a node's local disk is not known, and a run cannot resume from one."""
SAME_SPEED: Final = 0.02
"""Speeds that differ by less count as equal: the candidate that needs less memory or shards less is chosen."""


@dataclass(frozen=True)
class SearchRequest:
    """What is to be planned.

    Attributes:
        recipe: Recipe of the run.
        ask: Requested GPUs and nodes.
        here: Hardware of this machine.
        data: Facts of the prepared data; None where it is not prepared.
    """

    recipe: Recipe
    ask: DeviceRequest
    here: Hardware
    data: DataFacts | None


@dataclass(frozen=True)
class Candidate:
    """One configuration that can run the recipe.

    Attributes:
        engine: Engine.
        micro: Packs per pass; None where the engine itself is refused.
        checkpointing: Value of `parallel.checkpointing`.
        case: Estimate of its plan; None where it is refused.
        error: Why it is refused.
    """

    engine: Engine
    micro: int | None
    checkpointing: Checkpointing
    case: PlanEstimate | None
    error: UserError | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: simpler candidates first."""
        return ENGINES.index(self.engine), int(self.checkpointing != 0), self.micro or 0


def all_candidates(request: SearchRequest, basis: EstimateInputs) -> list[Candidate]:
    """Return all candidates."""
    return plan_candidates(request, basis, ENGINES, CHECKPOINTINGS, None)


def best_by_setting(found: Sequence[Candidate]) -> list[Candidate]:
    """Return the best candidate of each engine and checkpointing, as `--compare` shows them."""
    groups: dict[tuple[Engine, Checkpointing], list[Candidate]] = {}
    for candidate in found:
        groups.setdefault((candidate.engine, candidate.checkpointing), []).append(candidate)
    return [fastest(group) or group[0] for group in groups.values()]


def plan_candidates(
    request: SearchRequest,
    basis: EstimateInputs,
    engines: Sequence[Engine],
    checkpointings: Sequence[Checkpointing],
    micro: int | None,
) -> list[Candidate]:
    """Plan each combination.

    Args:
        request: What is planned.
        basis: Inputs of the estimates.
        engines: Engines to try.
        checkpointings: Values of `parallel.checkpointing` to try.
        micro: Packs per pass; None tries every number that divides a process's share.
    """
    found: list[Candidate] = []
    for engine in engines:
        sizes = [micro] if micro is not None else _micro_sizes(request, engine)
        if isinstance(sizes, UserError):
            found.append(Candidate(engine, None, False, None, sizes))
            continue
        tried = [_candidate(request, basis, engine, size, again) for again in checkpointings for size in sizes]
        # An error that all combinations share is reported once.
        errors = {str(each.error) for each in tried if each.case is None}
        if len(errors) == 1 and all(each.case is None for each in tried):
            tried = [Candidate(engine, None, False, None, tried[0].error)]
        found += tried
    return found


def fastest(found: Sequence[Candidate]) -> Candidate | None:
    """Return the fastest that fits with a margin, else the fastest that fits, else the one that needs least memory.

    Of equally fast candidates the simplest is returned. The result depends only on the estimates; it is None where
    every candidate is refused.
    """
    possible = [(each, each.case) for each in found if each.case is not None]
    comfortable = [(each, case) for each, case in possible if case.is_comfortable]
    for fitting in (comfortable, [(each, case) for each, case in possible if case.fits]):
        if fitting:
            limit = min(case.step_seconds for _, case in fitting) * (1 + SAME_SPEED)
            return min((each for each, case in fitting if case.step_seconds <= limit), key=lambda each: each.order)
    return min(possible, key=lambda pair: (pair[1].required_bytes, pair[0].order), default=(None, None))[0]


def fastest_fitting(found: Sequence[Candidate]) -> PlanEstimate | None:
    """Return the estimate of the fastest candidate that fits; None where none does."""
    best = fastest([each for each in found if each.case is not None and each.case.fits])
    return best.case if best is not None else None


def automatic_choice(found: Sequence[Candidate]) -> Candidate | None:
    """Return what `auto` chooses: the fastest that fits without the host's memory, otherwise with it.

    Where nothing fits, the result is the candidate that needs least; where everything is refused, None.
    """
    plain = fastest([each for each in found if each.engine not in (*LAST, *BY_NAME)])
    if plain is not None and plain.case is not None and plain.case.fits:
        return plain
    offloaded = [each for each in found if each.engine in LAST and each.case is not None and each.case.fits]
    return fastest(offloaded) or plain


def rejection_reason(candidate: Candidate, winner: Candidate) -> str:
    """Return why a candidate is not the one to choose; empty for the winner itself."""
    if candidate.case is None:
        assert candidate.error is not None
        return candidate.error.mistakes[0].why
    if candidate == winner:
        return ""
    case, best = candidate.case, winner.case
    assert best is not None
    if case.margin < 0:
        return f"does not fit: {-case.margin * case.basis.gpu.memory_bytes / 2**30:.1f} GiB too much"
    if not case.host_fits:
        return f"does not fit the host: {host_memory_text(case)}"
    reasons = []
    if candidate.engine in BY_NAME:
        reasons.append("used by name only")
    elif candidate.engine in LAST and winner.engine not in LAST:
        reasons.append(f"used only where nothing else fits: {host_memory_text(case)}")
    if not case.is_comfortable:
        reasons.append(f"leaves {case.margin:.1%}, less than {MARGIN:.0%}")
    slower = case.step_seconds / best.step_seconds - 1
    if slower > SAME_SPEED:
        reasons.append(f"{slower:.0%} slower: {_grown_part(case, best)}")
    return ", ".join(reasons) or f"as fast ({slower:+.1%}), less simple"


def host_memory_text(case: PlanEstimate) -> str:
    """Return the memory of a node that the plan needs, and what the node has."""
    available = case.basis.host_bytes
    has = "; the node's memory is not known here" if available is None else f", which has {size(available)}"
    return f"{size(case.storage.host_bytes)} of host memory per node{has}"


def _grown_part(case: PlanEstimate, best: PlanEstimate) -> str:
    """Return the name of the part of a step that takes longer by most."""
    before = {part.name: part.seconds for part in best.speed.parts}
    return max(case.speed.parts, key=lambda part: part.seconds - before.get(part.name, 0.0)).name


def with_fields(recipe: Recipe, engine: Engine, micro: int, checkpointing: Checkpointing) -> Recipe:
    """Return the recipe with these fields, without fields that belong to another engine."""
    return recipe.changed("batch", micro=micro).changed(
        "parallel",
        engine=engine,
        checkpointing=checkpointing,
        shard_group=recipe.parallel.shard_group if engine == "hsdp" else None,
        nvme=recipe.parallel.nvme if engine == "zero3_nvme" else None,
        offload_activations=recipe.parallel.offload_activations and checkpointing is not False,
    )


def checked_plan(recipe: Recipe, request: SearchRequest) -> RunPlan:
    """Return the plan of a changed recipe.

    Raises:
        UserError: The recipe breaks a rule, or cannot be planned.
    """
    for finding in rule_findings(recipe):
        raise UserError(finding.fact, finding.why, finding.fix)
    return make_plan(recipe, request.ask, request.here, request.data)


def _candidate(
    request: SearchRequest, basis: EstimateInputs, engine: Engine, micro: int, checkpointing: Checkpointing
) -> Candidate:
    try:
        plan = checked_plan(with_fields(request.recipe, engine, micro, checkpointing), request)
    except UserError as error:
        return Candidate(engine, micro, checkpointing, None, error)
    case = estimate_plan(plan, basis)
    assert case is not None, "inputs exist only where the weights are known"
    return Candidate(engine, micro, checkpointing, case)


def _micro_sizes(request: SearchRequest, engine: Engine) -> list[int] | UserError:
    """Return the packs per pass that divide a process's share, or why the engine cannot be used."""
    parallel: ParallelSection = with_fields(request.recipe, engine, 1, False).parallel
    try:
        topology, _ = choose_topology(parallel, request.ask, request.here)
    except UserError as error:
        return error
    batch = request.recipe.batch
    share = math.ceil(batch.packs / topology.data_ranks)
    most = max(1, MOST_TOKENS * topology.sequence // batch.length)
    return list(_divisors(share, most))


def _divisors(number: int, most: int) -> Iterator[int]:
    yield from (size for size in range(1, min(number, most) + 1) if number % size == 0)
