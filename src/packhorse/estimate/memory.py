"""Memory of one rank's device, by phase and component, before anything is allocated.

The sum is what torch's caching allocator reports as `torch.cuda.max_memory_allocated`. Memory outside the allocator
(CUDA context, communication buffers, fragmentation) is listed separately, because it is assumed and not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from packhorse.estimate import training_state
from packhorse.estimate.activations import Activations, count_activations
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.saved_tensors import COPIES
from packhorse.estimate.training_state import FP32, Component, total_bytes
from packhorse.estimate.weights import WIDTHS, WeightTensor, compute_width
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan

MIB: Final = 2**20
# Modules are loaded lazily since CUDA 11.7; NVIDIA's and torch's own kernels then take 0.3 to 0.6 GB of a device.
CONTEXT_BYTES: Final = 600 * MIB
# 32 MiB on Hopper and later (torch's notes on CUDA semantics, CUBLAS_WORKSPACE_CONFIG), for two streams.
CUBLAS_BYTES: Final = 64 * MIB
# Channels x NCCL_BUFFSIZE (4 MiB, NCCL's environment variables), for the communicators of a run.
NCCL_BYTES: Final = 400 * MIB
# With expandable segments, which the plan's environment sets; without them 10 % and more is seen.
FRAGMENTATION: Final = 0.03
STARTS_FROM_WEIGHTS: Final = ("pissa", "olora", "loftq")


@dataclass(frozen=True)
class Phase:
    """Memory on the device at the fullest moment of a phase.

    Attributes:
        name: `load`, `loss`, `backward`, `optimizer`, `evaluation` or `save`.
        components: Parts of the memory, none empty.
    """

    name: str
    components: tuple[Component, ...]

    @property
    def bytes(self) -> int:
        """Sum of all components."""
        return total_bytes(self.components)


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one device.

    Attributes:
        phases: Phases of a run, in order of time.
        outside: Memory that torch's allocator does not count.
        activations: Memory that a forward pass keeps for the backward pass.
    """

    phases: tuple[Phase, ...]
    outside: tuple[Component, ...]
    activations: Activations

    @property
    def peak(self) -> Phase:
        """Phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def required_bytes(self) -> int:
        """Memory that the device must have."""
        return self.peak.bytes + total_bytes(self.outside)

    def phase(self, name: str) -> Phase:
        """Return the phase with this name."""
        return next(phase for phase in self.phases if phase.name == name)


def estimate_memory(
    plan: RunPlan,
    shape: Shape,
    weights: tuple[WeightTensor, ...],
    packs: PackFigures,
    validation: PackFigures | None = None,
) -> MemoryEstimate:
    """Count the memory of the device of the rank that needs most.

    Args:
        plan: Plan of the run.
        shape: Shape of its model.
        weights: Result of `list_weights`.
        packs: Training packs; `PackFigures.full` where the data is not prepared.
        validation: Validation packs; None takes `packs`.
    """
    kept = count_activations(plan, shape, weights, packs)
    persistent = _persistent(plan, weights)
    evaluated = count_activations(plan, shape, weights, validation) if validation else kept
    phases = (
        Phase("load", _loading(plan, weights)),
        _phase("loss", persistent, _at_loss(plan, weights, kept)),
        _phase("backward", persistent, _in_backward(plan, weights, kept)),
        _phase("optimizer", persistent, _at_update(plan, weights)),
        _phase("evaluation", persistent, _in_evaluation(plan, weights, evaluated)),
        _phase("save", persistent, _saving(plan, weights)),
    )
    return MemoryEstimate(phases, _outside(plan, max(phase.bytes for phase in phases)), kept)


def _phase(name: str, persistent: Sequence[Component], more: Sequence[Component]) -> Phase:
    return Phase(name, tuple(part for part in (*persistent, *more) if part.bytes))


def _persistent(plan: RunPlan, weights: Sequence[WeightTensor]) -> list[Component]:
    """Return the components that stay from step to step."""
    parts = training_state.weight_components(plan, weights)
    share, ranks = training_state.trained_share(plan, weights), training_state.shard_ranks(plan)
    if not training_state.offloads(plan):
        where = f"of the 1/{ranks} that this rank updates" if ranks > 1 else "of what is trained"
        parts.append(Component("masters", training_state.master_bytes(plan, weights), f"float32 copies {where}"))
        if not training_state.uses_paging(plan):
            reason = f"{plan.recipe.optimizer.name}, {share:,} weights {where}"
            parts.append(Component("optimizer states", training_state.optimizer_bytes(plan, weights), reason))
        reason = "ZeRO-3's buffer for this rank's share, float32"
        parts.append(Component("gradients", training_state.zero3_gradient_bytes(plan, weights), reason))
    if _keeps_buckets(plan):
        parts += training_state.reduce_buckets(plan, weights)
    return parts


def _keeps_buckets(plan: RunPlan) -> bool:
    """Return whether the reduce buckets stay from step to step; otherwise they exist in the backward pass alone."""
    return plan.topology.engine == "ddp" or plan.topology.engine.startswith("zero3")


def _activations(kept: Activations, with_head: bool = True) -> list[Component]:
    parts = kept.kept_by_part(with_head)
    attention, loss = parts.pop("attention", 0), parts.pop("loss", 0)
    copies = parts.pop(COPIES, 0)
    layers = sum(layer.recomputed for layer in kept.layers)
    how = f"{layers} of {len(kept.layers)} layers are recomputed" if layers else "every layer's results are kept"
    where = ", their inputs in host memory" if kept.offloaded else ""
    gradients = kept.loss_gradients if with_head else 0
    return [
        Component("activations", sum(parts.values()), f"{kept.tokens:,} tokens; {how}{where}"),
        Component("attention", attention, "queries, keys, values and output of each layer that keeps its results"),
        Component("weight copies", copies, "16-bit copies of float32 weights, made by autocast and by the loss"),
        Component("loss", loss + gradients, "hidden states of supervised tokens, or the loss's own gradients"),
    ]


def _at_loss(plan: RunPlan, weights: Sequence[WeightTensor], kept: Activations) -> list[Component]:
    """Return the memory at the end of the forward pass; in 16 bit the loss's gradients belong to the backward pass."""
    waiting = training_state.waiting_gradient_bytes(plan, weights)
    backward = compute_width(plan) != FP32
    own = _head_gradients(plan, weights) if backward else 0
    return [
        *_activations(kept),
        Component("logits", kept.logits, "a chunk of rows of logits in float32, and the head's gradient"),
        Component("gradients", max(waiting, own), "of earlier passes, which wait for the update, and of the head"),
        *_gathered(plan, weights),
        *(_reduced_units(plan, weights, {_last_unit(weights)}) if backward else []),
        *(_temporary_buckets(plan, weights) if backward else []),
    ]


def _in_backward(plan: RunPlan, weights: Sequence[WeightTensor], kept: Activations) -> list[Component]:
    """Return the larger of the backward pass's two ends: all activations and few gradients, or the reverse."""
    waiting = training_state.waiting_gradient_bytes(plan, weights)
    workspace = Component("backward workspace", kept.layer_workspace, "gradients inside the layer being differentiated")
    first, tail = kept.layers[0], _last_unit(weights)
    later = [weight for weight in weights if weight.unit not in ("embedding", "layer 0")]
    own = first.total + (first.input if first.recomputed else 0)
    begin = [
        *_activations(kept, with_head=False),
        Component("recomputation", kept.recomputed, "one layer's results, computed again"),
        Component("gradients", max(waiting, _head_gradients(plan, weights)), "of earlier passes and of the last unit"),
        *_gathered(plan, weights, loss_keeps_head=compute_width(plan) != FP32),
        *_reduced_units(
            plan, weights, {unit for unit in _unit_bytes(weights, 1) if unit != "embedding" or unit == tail}
        ),
    ]
    end = [
        Component("activations", own + kept.inputs, "the first layer's results"),
        Component(
            "gradients",
            max(training_state.final_gradient_bytes(plan, later), waiting),
            "of all weights after this layer",
        ),
        *_gathered(plan, weights, without_last=True),
        *_reduced_units(plan, weights, {"embedding", "layer 0"}),
    ]
    return [*max(begin, end, key=total_bytes), workspace, *_temporary_buckets(plan, weights)]


def _temporary_buckets(plan: RunPlan, weights: Sequence[WeightTensor]) -> list[Component]:
    return [] if _keeps_buckets(plan) else training_state.reduce_buckets(plan, weights)


def _last_unit(weights: Sequence[WeightTensor]) -> str:
    """Return the unit that contains the output head."""
    return "head" if any(weight.unit == "head" and weight.kind == "base" for weight in weights) else "embedding"


def _head_gradients(plan: RunPlan, weights: Sequence[WeightTensor]) -> int:
    """Return the bytes of the gradients of output head and last norm, the first ones that exist."""
    if training_state.shards_weights(plan) or plan.topology.engine == "zero2":
        return 0
    tail = _last_unit(weights)
    return training_state.unreduced_gradient_bytes(
        plan, (weight for weight in weights if weight.trained and weight.unit == tail)
    )


def _unit_bytes(weights: Sequence[WeightTensor], width: int) -> dict[str, int]:
    """Return the bytes of each unit's weights when they are gathered for computation."""
    sizes: Counter[str] = Counter()
    for weight in weights:
        sizes[weight.unit] += weight.data_bytes if weight.storage != "plain" else weight.size * min(width, weight.width)
    return sizes


def _gathered(
    plan: RunPlan, weights: Sequence[WeightTensor], without_last: bool = False, loss_keeps_head: bool = False
) -> list[Component]:
    """Return the whole weights of the units in use and of the one that is prefetched."""
    if not training_state.shards_weights(plan) or training_state.shard_ranks(plan) == 1:
        return []
    units = _unit_bytes(weights, compute_width(plan))
    if training_state.is_deepspeed(plan):
        settings = training_state.zero_settings(plan)
        limit = int(settings.get("stage3_max_live_parameters", training_state.ALL_LIVE))
        _, gathered = training_state.split_persistent(plan, weights)
        elements = sum(weight.data_size for weight in gathered)
        live = sum(weight.data_bytes for weight in gathered) * min(1.0, limit / max(1, elements))
        reason = f"up to {limit:,} elements stay gathered (stage3_max_live_parameters)"
        # In its first step DeepSpeed frees the head after the forward pass, and gathers another one beside the loss's.
        heads = 2 * units[_last_unit(weights)] if loss_keeps_head else 0
        if heads > live:
            reason = "the output head twice: the loss keeps it, and the first step gathers another one"
        return [Component("gathered weights", int(max(live, heads, *units.values())), reason)]
    layer = max(size for unit, size in units.items() if unit.startswith("layer"))
    if without_last:
        size = max(3 * layer, 2 * units["embedding"])
        return [Component("gathered weights", size, "a unit in use, one prefetched, and its buffer")]
    reason = "last unit, which stays gathered, a layer in use, one prefetched, and its buffer"
    return [Component("gathered weights", units[_last_unit(weights)] + 3 * layer, reason)]


def _reduced_units(plan: RunPlan, weights: Sequence[WeightTensor], units: Collection[str]) -> list[Component]:
    """Return FSDP2's gradients of one whole unit, while they are computed and while they are sent."""
    if plan.topology.engine not in ("fsdp2", "hsdp"):
        return []
    sizes: Counter[str] = Counter()
    for weight in weights:
        if weight.trained and weight.unit in units:
            sizes[weight.unit] += weight.size
    largest = max(sizes.values(), default=0)
    reason = "gradients of one whole unit, and the float32 buffer that is reduce-scattered"
    return [Component("reduce buckets", largest * (compute_width(plan) + FP32), reason)]


def _at_update(plan: RunPlan, weights: Sequence[WeightTensor]) -> list[Component]:
    gradients = 0 if plan.recipe.optimizer.in_backward else training_state.final_gradient_bytes(plan, weights)
    return [Component("gradients", gradients, "of all trained weights"), training_state.update_buffer(plan, weights)]


def _in_evaluation(plan: RunPlan, weights: Sequence[WeightTensor], kept: Activations) -> list[Component]:
    reason = f"one layer's results for {kept.tokens:,} tokens; none is kept"
    return [
        Component("activations", kept.forward_workspace, reason),
        Component("logits", kept.logits, "a chunk of rows of logits in float32"),
        *_gathered(plan, weights),
    ]


def _saving(plan: RunPlan, weights: Sequence[WeightTensor]) -> list[Component]:
    saved = [weight for weight in weights if weight.trained or plan.recipe.method.trains_base]
    if training_state.shard_ranks(plan) == 1 or not saved:
        return []
    largest = max(weight.size for weight in saved) * FP32
    return [Component("gathered weights", largest, "the largest weight, gathered to be copied to the host")]


def _loading(plan: RunPlan, weights: Sequence[WeightTensor]) -> tuple[Component, ...]:
    """Return shards and one unit where weights are sharded, otherwise the whole model (docs/loading.md)."""
    width = WIDTHS[plan.chosen("model.dtype")]
    constants = sum(weight.constant_bytes for weight in weights)
    loaded = sum(_loaded_bytes(weight, width) for weight in weights) + constants
    method = plan.recipe.method
    needs_all = getattr(method, "initialization", "default") in STARTS_FROM_WEIGHTS or getattr(method, "dora", False)
    if not training_state.shards_weights(plan):
        parts = [Component("weights", loaded, f"whole, in the loaded type ({plan.chosen('model.dtype')})")]
        if training_state.is_deepspeed(plan):
            flat = sum(weight.size * weight.width for weight in weights if weight.trained)
            own = total_bytes(training_state.weight_components(plan, weights))
            own += training_state.master_bytes(plan, weights)
            if own + flat > loaded:
                parts = [
                    Component("weights", own, "as DeepSpeed keeps them, with its float32 copies"),
                    Component("flattening", flat, "a second copy of the trained weights while DeepSpeed flattens them"),
                ]
    elif needs_all and any(weight.storage != "plain" for weight in weights):
        parts = [Component("weights", loaded, "quantised, and whole before sharding: initialization needs them all")]
    else:
        unit = Component("unit", max(_unit_bytes(weights, width).values()), "the unit that is being loaded")
        parts = [*training_state.weight_components(plan, weights), unit]
    return tuple(part for part in parts if part.bytes)


def _loaded_bytes(weight: WeightTensor, width: int) -> int:
    if weight.storage != "plain":
        return weight.data_bytes
    return weight.size * (FP32 if weight.kind == "adapter" else width)


def _outside(plan: RunPlan, peak: int) -> tuple[Component, ...]:
    if plan.topology.device == "cpu":
        return ()
    parts = [
        Component("CUDA context", CONTEXT_BYTES + CUBLAS_BYTES, "kernels and workspaces; an assumption"),
        Component("fragmentation", int(FRAGMENTATION * peak), f"{FRAGMENTATION:.0%} of the peak; an assumption"),
    ]
    if plan.topology.world_size > 1:
        parts.insert(1, Component("communication", NCCL_BYTES, "NCCL's own buffers; an assumption"))
    return tuple(parts)
