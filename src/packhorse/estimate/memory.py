"""Memory of one rank's device, by phase and component, before anything is allocated.

Torch's caching allocator reports what is summed up here as `torch.cuda.max_memory_allocated`; what lies outside of it
(CUDA's context, communication buffers, fragments) stands apart, because it is a guess and the rest is counted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from packhorse.estimate import states
from packhorse.estimate.activations import Activations, count_activations
from packhorse.estimate.component import Component, total_bytes
from packhorse.estimate.held import WIDTHS, Held, compute_width, held_weights
from packhorse.estimate.layers import COPIES, FP32
from packhorse.estimate.packs import PackFigures
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan

MIB: Final = 2**20
# Modules are loaded lazily since CUDA 11.7; NVIDIA's and torch's own kernels then take 0.3 to 0.6 GB of a device.
CONTEXT_BYTES: Final = 600 * MIB
# 32 MiB on Hopper and later (torch's notes on CUDA semantics, CUBLAS_WORKSPACE_CONFIG), for two streams.
CUBLAS_BYTES: Final = 64 * MIB
# Channels x NCCL_BUFFSIZE (4 MiB, NCCL's environment variables), for the communicators of a run.
NCCL_BYTES: Final = 400 * MIB
# Of expandable segments, which the plan's environment asks for; without them a tenth and more is seen.
FRAGMENTS: Final = 0.03
STARTS_FROM_WEIGHTS: Final = ("pissa", "olora", "loftq")


@dataclass(frozen=True)
class Phase:
    """What is on the device at the fullest moment of a phase.

    Attributes:
        name: `load`, `loss`, `backward`, `optimizer`, `evaluation` or `save`.
        components: Its parts, none empty.
    """

    name: str
    components: tuple[Component, ...]

    @property
    def bytes(self) -> int:
        """All of them."""
        return total_bytes(self.components)


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one device.

    Attributes:
        phases: In the order in which they come.
        outside: What torch's allocator does not count.
        activations: What a forward pass keeps.
    """

    phases: tuple[Phase, ...]
    outside: tuple[Component, ...]
    activations: Activations

    @property
    def peak(self) -> Phase:
        """The fullest phase."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def required_bytes(self) -> int:
        """What the device must have for it all."""
        return self.peak.bytes + total_bytes(self.outside)

    def phase(self, name: str) -> Phase:
        """The phase of a name."""
        return next(phase for phase in self.phases if phase.name == name)


def estimate_memory(
    plan: RunPlan, shape: Shape, packs: PackFigures, validation: PackFigures | None = None
) -> MemoryEstimate | None:
    """Counts the memory of the fullest rank's device.

    Args:
        plan: Of the run.
        shape: Of its model.
        packs: That it trains on; `PackFigures.full` where the data is not prepared.
        validation: That it is evaluated on; absent, as `packs`.

    Returns:
        None where only the library knows what the method trains.
    """
    held = held_weights(plan, shape)
    if held is None:
        return None
    kept = count_activations(plan, shape, held, packs)
    resident = _resident(plan, held)
    evaluated = count_activations(plan, shape, held, validation) if validation else kept
    phases = (
        Phase("load", _loading(plan, held)),
        _phase("loss", resident, _at_loss(plan, held, kept)),
        _phase("backward", resident, _in_backward(plan, held, kept)),
        _phase("optimizer", resident, _at_step(plan, held)),
        _phase("evaluation", resident, _in_evaluation(plan, held, evaluated)),
        _phase("save", resident, _saving(plan, held)),
    )
    return MemoryEstimate(phases, _outside(plan, max(phase.bytes for phase in phases)), kept)


def _phase(name: str, resident: Sequence[Component], more: Sequence[Component]) -> Phase:
    return Phase(name, tuple(part for part in (*resident, *more) if part.bytes))


def _resident(plan: RunPlan, held: Sequence[Held]) -> list[Component]:
    """What stays from step to step."""
    parts = states.weights(plan, held)
    share, ranks = states.trained_share(plan, held), states.shard_ranks(plan)
    if not states.offloads(plan):
        where = f"of the 1/{ranks} that this rank steps" if ranks > 1 else "of what is trained"
        parts.append(Component("masters", states.masters(plan, held), f"float32 copies {where}"))
        if not states.pages(plan):
            reason = f"{plan.recipe.optimizer.name}, {share:,} weights {where}"
            parts.append(Component("optimizer states", states.optimizer_states(plan, held), reason))
        reason = "ZeRO-3's buffer for this rank's part, float32"
        parts.append(Component("gradients", states.kept_gradients(plan, held), reason))
    if plan.topology.engine == "ddp" or plan.topology.engine.startswith("zero3"):
        parts += states.buckets(plan, held)
    return parts


def _activations(kept: Activations, with_head: bool = True) -> list[Component]:
    parts = kept.kept_by_part(with_head)
    attention, loss = parts.pop("attention", 0), parts.pop("loss", 0)
    copies = parts.pop(COPIES, 0)
    layers = sum(layer.recomputed for layer in kept.layers)
    how = f"{layers} of {len(kept.layers)} layers are recomputed" if layers else "every layer's results are kept"
    where = ", their inputs in host memory" if kept.offloaded else ""
    stashed = kept.stashed if with_head else 0
    return [
        Component("activations", sum(parts.values()), f"{kept.tokens:,} tokens; {how}{where}"),
        Component("attention", attention, "queries, keys, values and output of each layer that keeps its results"),
        Component("weight copies", copies, "16-bit copies of float32 weights, made by autocast and by the loss"),
        Component("loss", loss + stashed, "hidden states of supervised tokens, or the loss's own gradients"),
    ]


def _at_loss(plan: RunPlan, held: Sequence[Held], kept: Activations) -> list[Component]:
    """The end of the forward pass; in 16 bit the loss makes its gradients as the backward pass begins."""
    reason = "a chunk of 512 rows of logits in float32, beside the head's gradient"
    waiting = states.waiting_gradients(plan, held)
    own = 0 if compute_width(plan) == FP32 else _last_gradients(plan, held)
    backs = compute_width(plan) != FP32
    return [
        *_activations(kept),
        Component("logits", kept.logits, reason),
        Component("gradients", max(waiting, own), "of the passes before, which wait for the step, and of the head"),
        *_gathered(plan, held),
        *(_reducing(plan, held, {_last_unit(held)}) if backs else []),
        *(_transient(plan, held) if backs else []),
    ]


def _in_backward(plan: RunPlan, held: Sequence[Held], kept: Activations) -> list[Component]:
    """The fuller of its two ends: all activations and few gradients, or the reverse."""
    waiting = states.waiting_gradients(plan, held)
    room = Component("backward room", kept.layer_room, "gradients inside the layer that is gone back through")
    first, tail = kept.layers[0], _last_unit(held)
    later = [each for each in held if each.unit not in ("embedding", "layer 0")]
    own = first.whole + (first.input if first.recomputed else 0)
    begins = [
        *_activations(kept, with_head=False),
        Component("recomputation", kept.recomputed, "one layer's results, computed again"),
        Component("gradients", max(waiting, _last_gradients(plan, held)), "of the passes before, and of the last unit"),
        *_gathered(plan, held),
        *_reducing(plan, held, {unit for unit in _units(held, 1) if unit != "embedding" or unit == tail}),
    ]
    ends = [
        Component("activations", own + kept.inputs, "the first layer's results"),
        Component("gradients", max(states.final_gradients(plan, later), waiting), "of all that follows this layer"),
        *_gathered(plan, held, without_last=True),
        *_reducing(plan, held, {"embedding", "layer 0"}),
    ]
    return [*max(begins, ends, key=total_bytes), room, *_transient(plan, held)]


def _transient(plan: RunPlan, held: Sequence[Held]) -> list[Component]:
    """Buckets that exist in the backward pass alone."""
    stay = plan.topology.engine == "ddp" or plan.topology.engine.startswith("zero3")
    return [] if stay else states.buckets(plan, held)


def _last_unit(held: Sequence[Held]) -> str:
    """The unit of the output head."""
    return "head" if any(each.unit == "head" and each.kind == "base" for each in held) else "embedding"


def _last_gradients(plan: RunPlan, held: Sequence[Held]) -> int:
    """Gradients of output head and last norm, the first that are there."""
    if states.cuts_weights(plan) or plan.topology.engine == "zero2":
        return 0
    tail = _last_unit(held)
    return states.whole_gradients(plan, (each for each in held if each.trained and each.unit == tail))


def _units(held: Sequence[Held], width: int) -> dict[str, int]:
    """Bytes of each unit's weights when they are gathered to compute with."""
    sizes: dict[str, int] = {}
    for each in held:
        own = each.data_bytes if each.storage != "plain" else each.size * min(width, each.width)
        sizes[each.unit] = sizes.get(each.unit, 0) + own
    return sizes


def _gathered(plan: RunPlan, held: Sequence[Held], without_last: bool = False) -> list[Component]:
    """Whole weights of what is computed with, and of what is fetched ahead."""
    if not states.cuts_weights(plan) or states.shard_ranks(plan) == 1:
        return []
    units = _units(held, compute_width(plan))
    if states.is_deepspeed(plan):
        limit = int(states.zero_settings(plan).get("stage3_max_live_parameters", states.ALL_LIVE))
        _, gathered = states.by_persistence(plan, held)
        elements = sum(prod(each.data_shape) for each in gathered)
        whole = sum(each.data_bytes for each in gathered)
        live = whole * min(1.0, limit / max(1, elements))
        reason = f"up to {limit:,} elements stay gathered (stage3_max_live_parameters)"
        return [Component("gathered weights", int(max(live, *units.values())), reason)]
    last = _last_unit(held)
    layer = max(size for unit, size in units.items() if unit.startswith("layer"))
    if without_last:
        size = max(3 * layer, 2 * units["embedding"])
        return [Component("gathered weights", size, "a unit in use, one fetched ahead, and its buffer")]
    reason = "last unit, which stays gathered, a layer in use, one fetched ahead, and its buffer"
    return [Component("gathered weights", units[last] + 3 * layer, reason)]


def _reducing(plan: RunPlan, held: Sequence[Held], units: Collection[str]) -> list[Component]:
    """FSDP2's gradients of a whole unit, as they were computed and as they are sent."""
    if plan.topology.engine not in ("fsdp2", "hsdp"):
        return []
    sizes: dict[str, int] = {}
    for each in held:
        if each.trained and each.unit in units:
            sizes[each.unit] = sizes.get(each.unit, 0) + each.size
    largest = max(sizes.values(), default=0)
    reason = "gradients of a whole unit, and the float32 buffer that they are shared out from"
    return [Component("reduce buckets", largest * (compute_width(plan) + FP32), reason)]


def _at_step(plan: RunPlan, held: Sequence[Held]) -> list[Component]:
    gradients = 0 if plan.recipe.optimizer.in_backward else states.final_gradients(plan, held)
    return [Component("gradients", gradients, "of all that is trained"), states.step_room(plan, held)]


def _in_evaluation(plan: RunPlan, held: Sequence[Held], kept: Activations) -> list[Component]:
    return [
        Component("activations", kept.forward_room, f"one layer's results for {kept.tokens:,} tokens; none is kept"),
        Component("logits", kept.logits, "a chunk of 512 rows of logits in float32"),
        *_gathered(plan, held),
    ]


def _saving(plan: RunPlan, held: Sequence[Held]) -> list[Component]:
    kept = [each for each in held if each.trained or plan.recipe.method.trains_base]
    if states.shard_ranks(plan) == 1 or not kept:
        return []
    largest = max(each.size for each in kept) * FP32
    return [Component("gathered weights", largest, "the largest weight, gathered to be copied to the host")]


def _loading(plan: RunPlan, held: Sequence[Held]) -> tuple[Component, ...]:
    """docs/loading.md: shards and one unit; whole where nothing is cut, or where a start needs all weights."""
    width = WIDTHS[plan.chosen("model.dtype")]
    sizes = _units(held, width)
    constants = sum(each.constant_bytes for each in held)
    recipe = plan.recipe
    if not states.cuts_weights(plan):
        loaded = sum(_stored(each, width) for each in held) + constants
        parts = [Component("weights", loaded, f"whole, as they are loaded ({plan.chosen('model.dtype')})")]
        if states.is_deepspeed(plan):
            flat = sum(each.size * each.width for each in held if each.trained)
            own = total_bytes(states.weights(plan, held)) + states.masters(plan, held)
            if own + flat > loaded:
                parts = [
                    Component("weights", own, "as DeepSpeed keeps them, with its float32 copies"),
                    Component("flattening", flat, "a second copy of what is trained while DeepSpeed makes it flat"),
                ]
        return tuple(part for part in parts if part.bytes)
    method = recipe.method
    quantized = any(each.storage != "plain" for each in held)
    needs_all = getattr(method, "initialization", "default") in STARTS_FROM_WEIGHTS or getattr(method, "dora", False)
    if quantized and needs_all:
        whole = sum(_stored(each, width) for each in held) + constants
        return (Component("weights", whole, "quantised, and whole before they are sharded: the start needs them all"),)
    parts = [*states.weights(plan, held), Component("unit", max(sizes.values()), "the unit that is being loaded")]
    return tuple(part for part in parts if part.bytes)


def _stored(held: Held, width: int) -> int:
    return held.data_bytes if held.storage != "plain" else held.size * (FP32 if held.kind == "adapter" else width)


def _outside(plan: RunPlan, peak: int) -> tuple[Component, ...]:
    if plan.topology.device == "cpu":
        return ()
    parts = [
        Component("CUDA context", CONTEXT_BYTES + CUBLAS_BYTES, "kernels and workspaces; an assumption"),
        Component("fragmentation", int(FRAGMENTS * peak), f"{FRAGMENTS:.0%} of the peak; an assumption"),
    ]
    if plan.topology.world_size > 1:
        parts.insert(1, Component("communication", NCCL_BYTES, "NCCL's own buffers; an assumption"))
    return tuple(parts)
