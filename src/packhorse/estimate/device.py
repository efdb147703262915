"""Seconds that one GPU takes for the arithmetic and the memory traffic of a pass.

A product takes the longer of its arithmetic and of moving its matrices (the roofline of Williams et al. 2009), at the
share of the peak that such products reach on that GPU and with the last wave of tiles as full as it is (NVIDIA, Matrix
Multiplication Background User's Guide).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

from packhorse.estimate.flops import PassWork, Products
from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.held import compute_width
from packhorse.estimate.traffic import Traffic
from packhorse.plan.run_plan import RunPlan

# Calibrated on the published runs of tests/unit/plan/test_cost_speed_published.py.
SUSTAINED: Final = 0.88
"""Of the best products' rate, what those of a model reach over a whole run: other shapes, heat, gaps."""
BANDWIDTH_SHARE: Final = 0.85
"""Of a memory's bandwidth, what streaming kernels reach."""
TILE: Final = 128
"""Rows and columns of a product that one processor works on at a time."""


class Device:
    """One GPU under the recipe's precision."""

    def __init__(self, plan: RunPlan, gpu: GpuProfile) -> None:
        self.peak_flops = gpu.peak_flops(plan.recipe.precision, plan.recipe.tf32)
        self.bytes_per_second = gpu.bytes_per_second * BANDWIDTH_SHARE
        self._width = compute_width(plan)
        self._gpu = gpu
        in_16_bit = plan.recipe.precision != "fp32"
        self._attention_rate = self.peak_flops * (gpu.attention_share if in_16_bit else gpu.matmul_share / 2)

    def product(self, each: Products, kind: str) -> float:
        """Seconds of the product of one weight: forward, or for the gradient of its input or of itself."""
        # Weights that are multiplied in one launch fill the processors together.
        sides = {
            "forward": (each.rows, each.outputs),
            "input": (each.rows, each.inputs),
            "weight": (each.outputs, each.inputs),
        }
        tiles = each.joined * ceil(sides[kind][0] / TILE) * ceil(sides[kind][1] / TILE)
        waves = tiles / self._gpu.processors
        rate = self.peak_flops * self._gpu.matmul_share * SUSTAINED * waves / ceil(waves)
        size = each.rows * (each.inputs + each.outputs) + each.inputs * each.outputs
        return max(each.one / rate, size * self._width / self.bytes_per_second)

    def plain(self, flops: float) -> float:
        """Seconds of large products."""
        return flops / (self.peak_flops * self._gpu.matmul_share * SUSTAINED)

    def attention(self, flops: float) -> float:
        """Seconds of attention."""
        return flops / self._attention_rate


@dataclass(frozen=True)
class PassTimes:
    """Seconds of one pass by what they are spent on, had the GPU nothing to wait for."""

    products_forward: float
    products_backward: float
    products_again: float
    attention_forward: float
    attention_backward: float
    attention_again: float
    traffic: tuple[tuple[Traffic, float, float], ...]

    @classmethod
    def of(cls, device: Device, work: PassWork, traffic: Sequence[Traffic]) -> PassTimes:
        """Adds up what one pass runs."""
        forward = backward = again = 0.0
        for each in work.products:
            one = device.product(each, "forward")
            forward += one * each.forward
            again += one * each.recomputed
            backward += device.product(each, "input") * each.input_gradients
            backward += device.product(each, "weight") * each.weight_gradients
        rate = device.bytes_per_second
        return cls(
            products_forward=forward,
            products_backward=backward,
            products_again=again,
            attention_forward=device.attention(work.attention.forward_flops),
            attention_backward=device.attention(work.attention.kernel_backward_flops),
            attention_again=device.attention(work.attention.recomputed_flops),
            traffic=tuple((each, each.forward / rate, each.backward / rate) for each in traffic),
        )

    @property
    def forward(self) -> float:
        """Of the forward pass."""
        return self.products_forward + self.attention_forward + sum(seconds for _, seconds, _ in self.traffic)

    @property
    def backward(self) -> float:
        """Of the backward pass, with what is recomputed."""
        products = self.products_backward + self.products_again
        attention = self.attention_backward + self.attention_again
        return products + attention + sum(seconds for _, _, seconds in self.traffic)
