"""Losses of preference objectives, as functions of the log-probability or the score of each answer.

Shapes: U pairs, or U answers with a verdict (kto). Every tensor is float64 [U], every loss is one number per unit. A
margin is positive where the model prefers the chosen answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DpoLoss = Literal["sigmoid", "hinge", "robust", "apo_zero"]


@dataclass(frozen=True, eq=False)
class Answers:
    """The chosen, or the rejected, answers of U pairs.

    Attributes:
        logp: Log-probability of the answer, summed over its tokens.
        num_tokens: Supervised tokens of the answer.
        reference: Log-probability under the reference model, zeros where the objective has none.
    """

    logp: Tensor
    num_tokens: Tensor
    reference: Tensor

    @property
    def logp_per_token(self) -> Tensor:
        """Mean log-probability of a token."""
        return self.logp / self.num_tokens

    @property
    def log_ratio(self) -> Tensor:
        """How much more likely the answer is than under the reference model, nats."""
        return self.logp - self.reference


def dpo_losses(
    chosen: Answers, rejected: Answers, beta: float, loss: DpoLoss, label_smoothing: float, sft_weight: float
) -> Tensor:
    """Return DPO's losses (Rafailov et al. 2023, arXiv 2305.18290, equation 7) and variants.

    Args:
        chosen: Preferred answers.
        rejected: Other answers.
        beta: Strength of the pull towards the reference model.
        loss: hinge: Zhao et al. 2023 (arXiv 2305.10425); robust: Chowdhury et al. 2024 (arXiv 2403.00409);
            apo_zero: D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7.
        label_smoothing: Share of pairs whose label is assumed wrong. With `sigmoid`: conservative DPO (Mitchell 2023).
        sft_weight: Weight of the chosen answer's loss per token (RPO: Pang et al. 2024, arXiv 2404.19733).
    """
    margins = beta * (chosen.log_ratio - rejected.log_ratio)
    match loss:
        case "sigmoid":
            losses = _smoothed(margins, label_smoothing)
        case "hinge":
            losses = torch.relu(1 - margins)
        case "robust":
            kept, flipped = (1 - label_smoothing) * F.logsigmoid(margins), label_smoothing * F.logsigmoid(-margins)
            losses = (flipped - kept) / (1 - 2 * label_smoothing)
        case "apo_zero":
            losses = torch.sigmoid(-beta * chosen.log_ratio) + torch.sigmoid(beta * rejected.log_ratio)
    return losses - sft_weight * chosen.logp_per_token if sft_weight else losses


def ipo_losses(chosen: Answers, rejected: Answers, tau: float) -> Tensor:
    """Return IPO's losses (Azar et al. 2023, arXiv 2310.12036, equation 17), log-probabilities per token.

    The paper does not say how answers of different lengths compare; its authors confirmed the mean over tokens to TRL.
    """
    margins = chosen.log_ratio / chosen.num_tokens - rejected.log_ratio / rejected.num_tokens
    return (margins - 1 / (2 * tau)).square()


def cpo_losses(chosen: Answers, rejected: Answers, beta: float, sft_weight: float) -> Tensor:
    """Return CPO's losses (Xu et al. 2024, arXiv 2401.08417): DPO with a uniform reference, and the chosen's loss."""
    return -F.logsigmoid(beta * (chosen.logp - rejected.logp)) - sft_weight * chosen.logp_per_token


def simpo_losses(chosen: Answers, rejected: Answers, beta: float, gamma: float) -> Tensor:
    """Return SimPO's losses (Meng et al. 2024, arXiv 2405.14734, equation 6); `gamma` is the target margin."""
    return -F.logsigmoid(beta * (chosen.logp_per_token - rejected.logp_per_token) - gamma)


def orpo_losses(chosen: Answers, rejected: Answers, weight: float, nll: Tensor | None = None) -> Tensor:
    """Return ORPO's losses (Hong et al. 2024, arXiv 2403.07691, equation 6).

    Args:
        chosen: Preferred answers.
        rejected: Other answers.
        weight: Weight of the odds ratio (lambda).
        nll: Loss per token of the chosen answers, where it covers more than the answer; None for that of the answer.
    """
    losses = -chosen.logp_per_token if nll is None else nll
    return losses - weight * F.logsigmoid(log_odds_ratio(chosen, rejected))


def log_odds_ratio(chosen: Answers, rejected: Answers) -> Tensor:
    """Return log(odds of chosen / odds of rejected), where a probability is that of a mean token."""
    return _log_odds(chosen.logp_per_token) - _log_odds(rejected.logp_per_token)


def kto_losses(
    log_ratio: Tensor, is_desirable: Tensor, baseline: float, beta: float, weights: tuple[float, float]
) -> Tensor:
    """Return KTO's losses (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8).

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


def reward_losses(chosen: Tensor, rejected: Tensor, margin: Tensor | None, centre: float) -> Tensor:
    """Return Bradley-Terry losses (Ouyang et al. 2022, arXiv 2203.02155, equation 1).

    Args:
        chosen: Scores of the preferred answers.
        rejected: Scores of the others.
        margin: By how much the row says that the chosen answer is better (Touvron et al. 2023, arXiv 2307.09288,
            equation 2); None where rows have none.
        centre: Weight of (chosen + rejected)², which keeps scores around 0 (Eisenstein et al. 2023, arXiv 2312.09244).
    """
    gap = chosen - rejected
    losses = -F.logsigmoid(gap if margin is None else gap - margin)
    return losses + centre * (chosen + rejected).square()


def _smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def _log_odds(logp: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p, finite where p rounds to 1."""
    return logp - torch.log(-torch.expm1(logp.clamp(max=-torch.finfo(logp.dtype).eps)))
