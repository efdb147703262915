"""Gradient noise scale: how large a batch still helps (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

The squared norm of a gradient over b tokens is on average |G|² + tr(Σ) / b. The norms over two numbers of tokens (the
first micro-batch of each process, and the whole step) give both unknowns; the noise scale is tr(Σ) / |G|². With a batch
of that size a step learns half as much as a step with infinitely many rows would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from packhorse.data.packs.loader import MicroBatch
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.gradient_norm import gradient_norm

# Single steps scatter widely; the paper averages both estimates over steps before it divides them.
DECAY = 0.95


@dataclass
class NoiseScale:
    """Measures the noise scale over the steps of an attempt; waits for the device twice per step.

    Attributes:
        engine: An engine that leaves each process its own gradient until the last micro-batch (single, ddp).
        packs_per_step: Packs per step, to express the result in packs.
    """

    engine: Engine
    packs_per_step: int
    _signal: float = 0.0
    _noise: float = 0.0
    _tokens_per_step: float = 0.0
    _part: list[float] = field(default_factory=list)

    def after_first_pass(self, micro_batch: MicroBatch, factor: float) -> None:
        """Measure the norm of this process's gradient of the first micro-batch.

        Args:
            micro_batch: The first micro-batch.
            factor: Factor that its sum of token losses was multiplied by.
        """
        num_tokens = micro_batch.targets.numel()
        if num_tokens == 0:  # a null pack
            self._part = [0.0, 0.0, 0.0]
            return
        norm = float(gradient_norm(self.engine.model.parameters())) / (factor * num_tokens)
        self._part = [norm**2, 1 / num_tokens, 1.0]

    def after_step(self, grad_norm: float, num_tokens: int) -> None:
        """Add a step to the averages; a collective.

        Args:
            grad_norm: Norm of the whole step's gradient, before clipping.
            num_tokens: Supervised tokens of the step, over all processes.
        """
        square, inverse, count = self.engine.sum_over_ranks(self._part)
        if count == 0 or not math.isfinite(grad_norm):
            return
        signal, noise = estimate(square / count, inverse / count, grad_norm**2, 1 / num_tokens)
        self._signal = DECAY * self._signal + (1 - DECAY) * signal
        self._noise = DECAY * self._noise + (1 - DECAY) * noise
        self._tokens_per_step = num_tokens

    def figures(self) -> dict[str, float]:
        """Return the noise scale in packs, infinite while noise hides the gradient; empty before the first step."""
        if self._tokens_per_step == 0:
            return {}
        tokens = self._noise / self._signal if self._signal > 0 else math.inf
        return {"train/noise_scale": tokens * self.packs_per_step / self._tokens_per_step}


def estimate(part_square: float, part_inverse: float, whole_square: float, whole_inverse: float) -> tuple[float, float]:
    """Return unbiased estimates of |G|² and tr(Σ), the variance of one token's gradient.

    Args:
        part_square: Mean squared norm of the gradients over parts of a step.
        part_inverse: Mean of 1 / tokens of these parts.
        whole_square: Squared norm of the gradient over the whole step.
        whole_inverse: 1 / tokens of the step.
    """
    noise = (part_square - whole_square) / (part_inverse - whole_inverse)
    return whole_square - noise * whole_inverse, noise
