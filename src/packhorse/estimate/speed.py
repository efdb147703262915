"""Time of a step and cost of a run: arithmetic, memory traffic, transfers and kernel launches of each pass.

A product takes the longer of its FLOPs at the rate that products reach on that GPU and of its bytes at the memory's
bandwidth (the roofline of Williams et al. 2009); everything else takes its bytes. A transfer that overlaps with
computation costs what is longer than `HIDDEN` of the computation, and the first transfer of a pass.

MFU and HFU are those of PaLM (arXiv 2204.02311, appendix B): the FLOPs that the mathematics needs, and all that run,
divided by what the GPUs could do in that time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from packhorse.estimate.communication import Links, Transfer, shard_group, transfers
from packhorse.estimate.flops import PassWork, Products, pass_work
from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.traffic import Traffic, pass_traffic, step_bytes
from packhorse.estimate.training_state import uses_muon
from packhorse.estimate.weights import WeightTensor, compute_width
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import FlopCounts, RunPlan
from packhorse.recipe.methods import LoraMethod

# Calibrated on the published runs of tests/unit/estimate/test_published_speed.py.
SUSTAINED: Final = 0.88
"""Share of the best products' rate that a model's products reach over a whole run: other shapes, heat, gaps."""
BANDWIDTH_SHARE: Final = 0.85
"""Share of a memory's bandwidth that streaming kernels reach."""
TILE: Final = 128
"""Rows at which a product reaches half of its rate: tiles and the last wave are then partly empty (NVIDIA,
Matrix Multiplication Background User's Guide)."""
HIDDEN: Final = 0.9
"""Share of the computation that hides a transfer."""

# Python and kernel launches of one decoder layer in eager mode, one way. Measured on an EPYC core without a GPU:
# 0.30 ms per layer of Llama and 0.04 ms per adapter. CUDA's launches, engines and experts are assumed.
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
"""Metrics, schedule and logging, once per step."""

PUBLISHED: Final = 0.3
"""Three quarters of the published runs are within it."""
CALIBRATED: Final = 0.05
"""Uncertainty of an estimate that a measured step has corrected."""


@dataclass(frozen=True)
class TimePart:
    """One part of a step's time.

    Attributes:
        name: Name of the part.
        seconds: Seconds in one step.
        reason: Where they come from, in one line.
    """

    name: str
    seconds: float
    reason: str


@dataclass(frozen=True)
class SpeedEstimate:
    """Time and cost of a plan.

    Attributes:
        parts: Parts of a step's time, which sum to the step.
        transfers: Every transfer, hidden or not.
        tokens_per_step: Real tokens of a mean step, over all ranks.
        model_flops: FLOPs of a step over all ranks, as MFU counts them.
        hardware_flops: FLOPs of a step over all ranks, as HFU counts them.
        world_size: Number of GPUs.
        peak_flops: Peak of one GPU, FLOP/s.
        power_watts: Board power of one GPU.
        num_steps: Steps of the run; None where they are not known yet.
        forward_seconds: Seconds of one forward pass with its transfers, which evaluation consists of.
        uncertainty: 0.3 means that the speed may be 30 % higher or lower.
        uncertainty_reason: Source of the uncertainty.
        factor: Measured divided by predicted time, where a measured run has corrected the estimate.
        price_per_gpu_hour: Price that the user gave.
        before_seconds: Seconds of a pass over the data before the first step.
    """

    parts: tuple[TimePart, ...]
    transfers: tuple[Transfer, ...]
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
    before_seconds: float = 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds of a mean step, without evaluations and checkpoints."""
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Real tokens per second of one GPU."""
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
    def flop_counts(self) -> FlopCounts:
        """FLOPs of a mean token, from which a run computes its measured MFU."""
        return FlopCounts(
            model_per_token=self.model_flops / self.tokens_per_step,
            hardware_per_token=self.hardware_flops / self.tokens_per_step,
            peak_per_second=self.peak_flops,
        )

    @property
    def hours(self) -> float | None:
        """Hours of all steps, and of a pass before them."""
        if self.num_steps is None:
            return None
        return (self.num_steps * self.step_seconds + self.before_seconds) / 3600

    @property
    def energy_kwh(self) -> float | None:
        """Energy of the GPUs at board power, which is their maximum."""
        return None if self.hours is None else self.hours * self.world_size * self.power_watts / 1000

    @property
    def price(self) -> float | None:
        """Price of the run, in the currency of the price per GPU hour."""
        if self.hours is None or self.price_per_gpu_hour is None:
            return None
        return self.hours * self.world_size * self.price_per_gpu_hour


def estimate_speed(
    plan: RunPlan,
    shape: Shape,
    weights: tuple[WeightTensor, ...],
    packs: PackFigures,
    gpu: GpuProfile,
    network_gb: float | None = None,
    price_per_gpu_hour: float | None = None,
) -> SpeedEstimate:
    """Estimate the time of a step and the cost of the run.

    Args:
        plan: Plan of the run.
        shape: Shape of its model.
        weights: Result of `list_weights`.
        packs: Sizes of its packs.
        gpu: Kind of GPU.
        network_gb: GB/s of one GPU between nodes, in one direction; None takes the profile's.
        price_per_gpu_hour: Price in any currency.
    """
    work = pass_work(plan, shape, packs)
    network = (gpu.network_gb if network_gb is None else network_gb) * 1e9
    moved = transfers(plan, shape, weights, work, Links(gpu, network))
    rates = Rates.of(plan, gpu)
    computing = _pass_parts(rates, work, pass_traffic(plan, shape, work))
    passes, ranks = plan.batch.accumulation_steps, plan.topology.world_size
    # A step takes as long as its fullest rank; null packs are no work.
    full_ranks = ranks * plan.batch.packs_per_step / (plan.topology.data_ranks * plan.batch.packs_per_rank)
    uncertainty, why = _uncertainty(plan, moved)
    return SpeedEstimate(
        parts=(
            *_compute_parts(plan, shape, work, computing),
            *_transfer_parts(moved, computing, passes, shape),
            *_optimizer_parts(plan, weights, rates),
            TimePart("fixed", STEP_SECONDS, "metrics, schedule and logging of a step (assumed)"),
        ),
        transfers=moved,
        tokens_per_step=plan.batch.packs_per_step * packs.tokens_mean,
        model_flops=work.model_flops * passes * full_ranks,
        hardware_flops=work.hardware_flops * passes * full_ranks,
        world_size=ranks,
        peak_flops=gpu.peak_flops(plan.recipe.precision, plan.recipe.tf32),
        power_watts=gpu.power_watts,
        num_steps=plan.num_steps,
        forward_seconds=_forward_seconds(moved, computing),
        uncertainty=uncertainty,
        uncertainty_reason=why,
        price_per_gpu_hour=price_per_gpu_hour,
    )


def scaled(estimate: SpeedEstimate, factor: float, source: str) -> SpeedEstimate:
    """Return an estimate whose every part takes `factor` times as long, as measured on `source`."""
    return replace(
        estimate,
        parts=tuple(replace(part, seconds=part.seconds * factor) for part in estimate.parts),
        forward_seconds=estimate.forward_seconds * factor,
        before_seconds=estimate.before_seconds * factor,
        factor=estimate.factor * factor,
        uncertainty=CALIBRATED,
        uncertainty_reason=f"scaled by {factor:.2f} to {source}",
    )


def measured_step_seconds(figures: Iterable[Mapping[str, object]]) -> float | None:
    """Return the median step of a run's metrics, in seconds, without evaluations, checkpoints and the first reading.

    Args:
        figures: Lines of metrics.jsonl.

    Returns:
        None where there are fewer than two readings of speed.
    """
    seconds = []
    for line in figures:
        step, other = line.get("speed/step_seconds"), line.get("speed/other_seconds", 0.0)
        if isinstance(step, (int, float)) and isinstance(other, (int, float)):
            seconds.append(float(step) - float(other))
    # The first one is a warm-up.
    return median(seconds[1:]) if len(seconds) > 1 else None


@dataclass(frozen=True)
class Rates:
    """Rates that one GPU reaches under the recipe's precision.

    Attributes:
        products: FLOP/s of matrix products.
        attention: FLOP/s of attention.
        bytes: Bytes/s of its memory.
        width: Bytes per element in matrix products.
    """

    products: float
    attention: float
    bytes: float
    width: int

    @classmethod
    def of(cls, plan: RunPlan, gpu: GpuProfile) -> Rates:
        """Return the rates of a GPU for a plan."""
        peak = gpu.peak_flops(plan.recipe.precision, plan.recipe.tf32)
        in_16_bit = plan.recipe.precision != "fp32"
        return cls(
            products=peak * gpu.matmul_share * SUSTAINED,
            attention=peak * (gpu.attention_share if in_16_bit else gpu.matmul_share / 2),
            bytes=gpu.bytes_per_second * BANDWIDTH_SHARE,
            width=compute_width(plan),
        )

    def product_seconds(self, products: Products) -> float:
        """Return the seconds of one product."""
        rows = products.rows
        elements = rows * (products.inputs + products.outputs) + products.inputs * products.outputs
        return max(products.one / self.products * (1 + TILE / max(rows, 1.0)), elements * self.width / self.bytes)


@dataclass(frozen=True)
class PassPart:
    """Seconds of one pass that one kind of work takes on the GPU."""

    name: str
    forward: float
    backward: float
    reason: str


def _pass_parts(rates: Rates, work: PassWork, traffic: Sequence[Traffic]) -> list[PassPart]:
    forward = backward = again = 0.0
    for each in work.products:
        seconds = rates.product_seconds(each)
        forward += seconds * each.forward
        again += seconds * each.recomputed
        backward += seconds * (each.input_gradients + each.weight_gradients)
    attention = work.attention
    again += attention.recomputed_flops / rates.attention
    attention_seconds = (attention.forward_flops / rates.attention, attention.kernel_backward_flops / rates.attention)
    return [
        PassPart("products", forward, backward, "matrix products, forward and backward"),
        PassPart("attention", *attention_seconds, "attention, forward and backward"),
        PassPart("recomputation", 0.0, again, f"{work.layers_recomputed} layers once more, and logits of the loss"),
        *(
            PassPart(each.name, each.forward / rates.bytes, each.backward / rates.bytes, each.reason)
            for each in traffic
        ),
    ]


def _compute_parts(plan: RunPlan, shape: Shape, work: PassWork, parts: Sequence[PassPart]) -> list[TimePart]:
    passes, host = plan.batch.accumulation_steps, _host_seconds(plan, shape, work)
    waiting = host - sum(each.forward + each.backward for each in parts)
    reason = f"a pass takes {host * 1000:.0f} ms of Python and launches, longer than its computation"
    found = [TimePart(each.name, passes * (each.forward + each.backward), each.reason) for each in parts]
    return [part for part in (*found, TimePart("launches", passes * max(0.0, waiting), reason)) if part.seconds]


def _host_seconds(plan: RunPlan, shape: Shape, work: PassWork) -> float:
    """Return the seconds of Python and launches in one pass."""
    method = plan.recipe.method
    # Adapters of all experts of a layer are one launch.
    adapters = sum(
        each.forward if each.rows == work.tokens else len(shape.sparse_layers)
        for each in work.products
        if each.part == "adapter" and each.name.endswith("adapter_a")
    )
    one_way = shape.layers * (LAYER_SECONDS + HOOK_SECONDS.get(plan.topology.engine, 0.0))
    one_way += EXPERT_SECONDS * len(shape.sparse_layers)
    one_way += adapters * ADAPTER_SECONDS * (3 if isinstance(method, LoraMethod) and method.dora else 1)
    back = (work.layers_backward + work.layers_recomputed) / shape.layers
    return one_way * (1.0 + back)


def _transfer_parts(
    moved: Sequence[Transfer], computing: Sequence[PassPart], passes: int, shape: Shape
) -> list[TimePart]:
    """Return the time that a step waits for transfers."""
    parts = [
        TimePart(each.name, each.times * each.seconds, f"{each.reason}; nothing overlaps with it")
        for each in moved
        if not each.hidden
    ]
    forward, backward = sum(each.forward for each in computing), sum(each.backward for each in computing)
    for phase, busy in (("forward", forward), ("backward", backward)):
        hidden = [each for each in moved if each.hidden and each.phase == phase]
        every = sum(each.seconds for each in hidden if each.times == passes and passes > 1)
        last = sum(each.seconds for each in hidden) - every
        # The first layer's weights come before there is anything to compute, and its gradients after.
        start = sum(each.seconds * each.times for each in hidden) / (shape.layers + 2)
        waited = (passes - 1) * max(0.0, every - HIDDEN * busy) + max(0.0, every + last - HIDDEN * busy)
        if hidden:
            share = f"{every + last:.3g} s of transfers and {busy:.3g} s of computation in the last pass"
            names = " and ".join(dict.fromkeys(each.name for each in hidden))
            parts.append(TimePart(f"waiting for {names} {phase}", start + waited, share))
    return parts


def _forward_seconds(moved: Sequence[Transfer], computing: Sequence[PassPart]) -> float:
    busy, forward = sum(each.forward for each in computing), [each for each in moved if each.phase == "forward"]
    hidden = sum(each.seconds for each in forward if each.hidden)
    waited = sum(each.seconds for each in forward if not each.hidden)
    return busy + waited + max(0.0, hidden - HIDDEN * busy)


def _optimizer_parts(plan: RunPlan, weights: Sequence[WeightTensor], rates: Rates) -> list[TimePart]:
    parts = [TimePart("optimizer", step_bytes(plan, weights) / rates.bytes, "weights, gradients and states once")]
    if plan.recipe.optimizer.name == "muon":
        ranks = 1 if plan.topology.engine in ("single", "ddp") else shard_group(plan.topology).size
        seconds = muon_flops(weights) / rates.products / ranks
        parts.append(TimePart("orthogonalisation", seconds, "Muon's five iterations of Newton-Schulz"))
    return [part for part in parts if part.seconds]


def muon_flops(weights: Sequence[WeightTensor]) -> float:
    """Return the FLOPs of Muon's Newton-Schulz iterations (arXiv 2502.16982) on every trained matrix of the layers.

    For a matrix [m, n] with m <= n each of five iterations computes X Xᵀ, its square, and their product with X:
    4 m² n + 2 m³.
    """
    shapes = [each.shape for each in weights if each.trained and uses_muon(each)]
    return sum(5.0 * (4 * min(sides) ** 2 * max(sides) + 2 * min(sides) ** 3) for sides in shapes)


def _uncertainty(plan: RunPlan, moved: Sequence[Transfer]) -> tuple[float, str]:
    """Return the gap of the published runs; larger where something decides that none of them has."""
    if any("host" in each.name or "disk" in each.name for each in moved):
        return 0.5, "speed of host memory and disk is assumed"
    if plan.topology.num_nodes > 1:
        return 0.4, "networks between nodes differ; one published study was fitted"
    return PUBLISHED, "three quarters of the published runs are within it"
