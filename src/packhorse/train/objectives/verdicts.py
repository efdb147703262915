"""Losses of single answers with a verdict, good or bad (KTO: Ethayarajh et al. 2024, arXiv 2402.01306).

Shapes: U answers. Every tensor is float64 [U].
"""

from __future__ import annotations

import torch
from torch import Tensor


def kto_losses(
    log_ratio: Tensor, is_desirable: Tensor, baseline: float, beta: float, weights: tuple[float, float]
) -> Tensor:
    """Return KTO's losses (equation 8).

    Args:
        log_ratio: How much more likely each answer is than under the reference model, nats.
        is_desirable: bool [U].
        baseline: z0, the KL divergence from the reference model, nats; see `kl_baseline`.
        beta: Strength of the pull towards the reference model.
        weights: Weights of desirable and of undesirable answers.
    """
    distance = beta * (log_ratio - baseline)
    value = torch.sigmoid(torch.where(is_desirable, distance, -distance))
    weight = torch.where(is_desirable, value.new_full((), weights[0]), value.new_full((), weights[1]))
    return weight * (1 - value)


def kl_baseline(sum_of_log_ratios: float, num_answers: float) -> float:
    """Return z0: the mean log-ratio of answers that belong to other prompts, at least 0; a step has one for all ranks.

    Args:
        sum_of_log_ratios: Over the mismatched answers of the step.
        num_answers: Number of mismatched answers of the step.
    """
    return max(0.0, sum_of_log_ratios / num_answers) if num_answers else 0.0
