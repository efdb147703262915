"""How long a step takes, and what a run costs: arithmetic, memory, links and launches of each pass.

MFU and HFU are those of PaLM (arXiv 2204.02311, appendix B): operations that the mathematics asks for, and all that
run, over what the GPUs could have done in that time.

What hides: transfers that run beside computation cost what is longer than `HIDDEN` of it, and the first one of a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from packhorse.estimate.communication import Exchange, Fabric, exchanges, shard_group
from packhorse.estimate.device import Device, PassTimes
from packhorse.estimate.flops import PassWork, pass_work
from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.held import Held, held_weights
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.traffic import pass_traffic, step_bytes
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.methods import LoraMethod

HIDDEN: Final = 0.9

# Python and launches of a decoder layer run eagerly, one way. Measured on an EPYC core without a GPU: 0.30 ms a layer
# of Llama and 0.04 ms an adapter more; CUDA's launches come on top, and what engines and experts add is assumed.
LAYER_SECONDS: Final = 0.35e-3
ADAPTER_SECONDS: Final = 0.05e-3
EXPERT_SECONDS: Final = 0.3e-3
HOOK_SECONDS: Final = {
    "fsdp2": 0.15e-3,
    "hsdp": 0.15e-3,
    "zero3": 0.8e-3,
    "zero3_offload": 0.8e-3,
    "zero3_nvme": 0.8e-3,
}
STEP_SECONDS: Final = 5e-3
"""Reading figures, schedule, logging: once a step."""

PUBLISHED: Final = 0.3
"""Three quarters of the published runs lie within it."""
CALIBRATED: Final = 0.05
"""Uncertainty of an estimate that a measured step has corrected."""


@dataclass(frozen=True)
class TimePart:
    """A part of a step's seconds."""

    name: str
    seconds: float
    reason: str


@dataclass(frozen=True)
class SpeedEstimate:
    """What a plan costs in time.

    Attributes:
        parts: Their seconds add up to a step.
        exchanges: Every transfer, hidden or not.
        tokens_per_step: Real tokens of a mean step, over all ranks.
        model_flops: Of a step over all ranks, as MFU counts.
        hardware_flops: All that run.
        world_size: GPUs.
        peak_flops: Of one GPU.
        power_watts: Of one GPU.
        num_steps: Of the run; None where it is not known yet.
        forward_seconds: Of one forward pass with its transfers; an evaluation is made of these.
        uncertainty: 0.3 says that the speed may well be 30 % higher or lower.
        uncertainty_reason: Why so much.
        factor: Measured over predicted, where a measured run has corrected the estimate.
        price_per_gpu_hour: As the user gave it.
    """

    parts: tuple[TimePart, ...]
    exchanges: tuple[Exchange, ...]
    tokens_per_step: float
    model_flops: float
    hardware_flops: float
    world_size: int
    peak_flops: float
    power_watts: float
    num_steps: int | None
    forward_seconds: float
    uncertainty: float
    uncertainty_reason: str
    factor: float = 1.0
    price_per_gpu_hour: float | None = None

    @property
    def step_seconds(self) -> float:
        """Of a mean step, without evaluations and checkpoints."""
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Real tokens."""
        return self.tokens_per_step / self.step_seconds / self.world_size

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        return self.model_flops / (self.step_seconds * self.world_size * self.peak_flops)

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation."""
        return self.hardware_flops / (self.step_seconds * self.world_size * self.peak_flops)

    @property
    def hours(self) -> float | None:
        """Of all steps."""
        return None if self.num_steps is None else self.num_steps * self.step_seconds / 3600

    @property
    def energy_kwh(self) -> float | None:
        """Of the GPUs at board power: what they draw at most."""
        return None if self.hours is None else self.hours * self.world_size * self.power_watts / 1000

    @property
    def price(self) -> float | None:
        """In the currency of the price that was given."""
        if self.hours is None or self.price_per_gpu_hour is None:
            return None
        return self.hours * self.world_size * self.price_per_gpu_hour


def estimate_speed(
    plan: RunPlan,
    shape: Shape,
    packs: PackFigures,
    gpu: GpuProfile,
    network_gb: float | None = None,
    price_per_gpu_hour: float | None = None,
) -> SpeedEstimate | None:
    """The time of a step and what follows from it.

    Args:
        plan: Of the run.
        shape: Of its model.
        packs: What its packs hold.
        gpu: That it would run on.
        network_gb: GB/s of one GPU between nodes, in one direction; None takes the profile's.
        price_per_gpu_hour: In any currency.

    Returns:
        None where what the method trains is the library's choice.
    """
    work, held = pass_work(plan, shape, packs), held_weights(plan, shape)
    if work is None or held is None:
        return None
    network = (gpu.network_gb if network_gb is None else network_gb) * 1e9
    moved = exchanges(plan, shape, held, work, Fabric(gpu, network))
    device = Device(plan, gpu)
    times = PassTimes.of(device, work, pass_traffic(plan, shape, held, work))
    passes, ranks = plan.batch.accumulation_steps, plan.topology.world_size
    uncertainty, why = _uncertainty(plan, moved)
    return SpeedEstimate(
        parts=(
            *_compute_parts(plan, shape, work, times),
            *_transfer_parts(moved, times, passes, shape),
            *_optimizer_parts(plan, held, device),
            TimePart("fixed", STEP_SECONDS, "figures, schedule and logging of a step (assumed)"),
        ),
        exchanges=moved,
        tokens_per_step=plan.batch.packs_per_step * packs.tokens_mean,
        model_flops=work.model_flops * passes * ranks,
        hardware_flops=work.hardware_flops * passes * ranks,
        world_size=ranks,
        peak_flops=device.peak_flops,
        power_watts=gpu.power_watts,
        num_steps=plan.num_steps,
        forward_seconds=_forward_seconds(moved, times),
        uncertainty=uncertainty,
        uncertainty_reason=why,
        price_per_gpu_hour=price_per_gpu_hour,
    )


def scaled(estimate: SpeedEstimate, factor: float, source: str) -> SpeedEstimate:
    """An estimate whose every part takes `factor` times as long: of another plan, on the machine that was measured."""
    return replace(
        estimate,
        parts=tuple(replace(part, seconds=part.seconds * factor) for part in estimate.parts),
        forward_seconds=estimate.forward_seconds * factor,
        factor=estimate.factor * factor,
        uncertainty=CALIBRATED,
        uncertainty_reason=f"scaled by {factor:.2f} to {source}",
    )


def measured_step_seconds(figures: Iterable[Mapping[str, object]]) -> float | None:
    """Seconds of a step in a run's metrics, without evaluations and checkpoints: the median without the first reading.

    Args:
        figures: Lines of metrics.jsonl.

    Returns:
        None where there are no two readings of speed.
    """
    seconds = []
    for line in figures:
        step, other = line.get("speed/step_seconds"), line.get("speed/other_seconds", 0.0)
        if isinstance(step, (int, float)) and isinstance(other, (int, float)):
            seconds.append(float(step) - float(other))
    # The first one warms up.
    return median(seconds[1:]) if len(seconds) > 1 else None


def _compute_parts(plan: RunPlan, shape: Shape, work: PassWork, times: PassTimes) -> list[TimePart]:
    passes = plan.batch.accumulation_steps
    parts = [
        TimePart("products", passes * (times.products_forward + times.products_backward), "matrix products, both ways"),
        TimePart("attention", passes * (times.attention_forward + times.attention_backward), "attention, both ways"),
        TimePart(
            "recomputation",
            passes * (times.products_again + times.attention_again),
            f"products and attention of {work.layers_recomputed} layers once more, and logits of the loss",
        ),
        *(TimePart(each.name, passes * (forward + back), each.reason) for each, forward, back in times.traffic),
    ]
    host = _host_seconds(plan, shape, work)
    waiting = max(0.0, host - times.forward - times.backward)
    if waiting:
        reason = f"a pass takes {host * 1000:.0f} ms of Python and launches, longer than its computation"
        parts.append(TimePart("launches", passes * waiting, reason))
    return [part for part in parts if part.seconds]


def _host_seconds(plan: RunPlan, shape: Shape, work: PassWork) -> float:
    """Python and launches of a pass."""
    method = plan.recipe.method
    adapted = sum(each.forward / each.joined for each in work.products if each.name.endswith("adapter_a"))
    one_way = shape.layers * (LAYER_SECONDS + HOOK_SECONDS.get(plan.topology.engine, 0.0))
    one_way += EXPERT_SECONDS * len(shape.sparse_layers)
    one_way += adapted * ADAPTER_SECONDS * (3 if isinstance(method, LoraMethod) and method.dora else 1)
    back = (work.layers_backward + work.layers_recomputed) / shape.layers
    return one_way * (1.0 + back)


def _transfer_parts(moved: Sequence[Exchange], times: PassTimes, passes: int, shape: Shape) -> list[TimePart]:
    """Transfers as far as a step waits for them."""
    parts = [
        TimePart(each.name, each.times * each.seconds, f"{each.reason}; nothing runs beside it")
        for each in moved
        if not each.hidden
    ]
    for phase, computing in (("forward", times.forward), ("backward", times.backward)):
        hidden = [each for each in moved if each.hidden and each.phase == phase]
        every = sum(each.seconds for each in hidden if each.times == passes and passes > 1)
        last = sum(each.seconds for each in hidden) - every
        # The first layer's weights come before there is anything to compute, and its gradients after.
        start = sum(each.seconds * each.times for each in hidden) / (shape.layers + 2)
        waited = (passes - 1) * max(0.0, every - HIDDEN * computing) + max(0.0, every + last - HIDDEN * computing)
        if hidden:
            share = f"{every + last:.3g} s beside {computing:.3g} s of computing in the last pass"
            names = " and ".join(dict.fromkeys(each.name for each in hidden))
            parts.append(TimePart(f"waiting for {names} {phase}", start + waited, share))
    return parts


def _forward_seconds(moved: Sequence[Exchange], times: PassTimes) -> float:
    forward = [each for each in moved if each.phase == "forward"]
    hidden = sum(each.seconds for each in forward if each.hidden)
    waited = sum(each.seconds for each in forward if not each.hidden)
    return times.forward + waited + max(0.0, hidden - HIDDEN * times.forward)


def _optimizer_parts(plan: RunPlan, held: Sequence[Held], device: Device) -> list[TimePart]:
    parts = [
        TimePart("optimizer", step_bytes(plan, held) / device.bytes_per_second, "weights, gradients and states once")
    ]
    if plan.recipe.optimizer.name == "muon":
        ranks = 1 if plan.topology.engine in ("single", "ddp") else shard_group(plan.topology).size
        seconds = device.plain(muon_flops(held)) / ranks
        parts.append(TimePart("orthogonalisation", seconds, "Muon's five iterations of Newton-Schulz"))
    return [part for part in parts if part.seconds]


def muon_flops(held: Sequence[Held]) -> float:
    """Operations of Muon's Newton-Schulz iterations (arXiv 2502.16982) on every trained matrix of the layers.

    Of a matrix [m, n] with m <= n each of five makes X Xᵀ, its square, and their product with X: 4 m² n + 2 m³.
    """
    matrices = (each.shape for each in held if each.trained and len(each.shape) == 2 and each.unit.startswith("layer"))
    return sum(5.0 * (4 * min(sides) ** 2 * max(sides) + 2 * min(sides) ** 3) for sides in matrices)


def _uncertainty(plan: RunPlan, moved: Sequence[Exchange]) -> tuple[float, str]:
    """How far off the published runs are, and more where what they had none of decides."""
    names = {each.name for each in moved}
    if any("host" in name or "disk" in name for name in names):
        return 0.5, "what a host's memory and disk give is assumed"
    if plan.topology.num_nodes > 1:
        return 0.4, "networks between nodes differ; one published study was fitted"
    return PUBLISHED, "three quarters of the published runs lie within it"
