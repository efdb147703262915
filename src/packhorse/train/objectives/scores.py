"""Losses of a reward model: one score per answer, the chosen one above the rejected one.

Shapes: U pairs. Every tensor is float64 [U].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
