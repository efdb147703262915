"""Divergence of a student from its teacher, chunk by chunk: neither model's logits exist in full.

Shapes: S supervised tokens, c tokens of a chunk, H and G hidden widths of student and teacher, V vocabulary of the
student, U tokens that both models have, k tokens that were kept of the teacher.

    p, q       softmax(logits / temperature) of teacher and student
    forward    KL(p || q)        reverse    KL(q || p)        jsd    (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2
    loss       weight x temperature² x divergence + sft_weight x cross-entropy, summed over tokens

Gradients with respect to logits shrink with temperature², which the factor undoes (Hinton et al. 2015, arXiv
1503.02531, section 2). The vocabularies of a model family may be padded to different sizes; the last ids, which no
token has, are then cut from the divergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Some six tensors of [c, V] exist at once: 930 MB in fp32 for a vocabulary of 151,936.
CHUNK_TOKENS: Final = 256

Divergence = Literal["forward", "reverse", "jsd"]


class Teacher(Protocol):
    """The teacher's probabilities of the S supervised tokens."""

    def compare(self, student: Tensor, chunk: slice, loss: DistilLoss) -> tuple[Tensor, Tensor]:
        """Compare with log-probabilities of the student, [c, V], which may be overwritten.

        Returns:
            Divergence, teacher's entropy, its kept mass, and 1 where both rank the same token first, [4, c];
            derivative of the divergence with respect to the student's logits / temperature, [c, V].
        """
        ...


@dataclass(frozen=True)
class DistilLoss:
    """Which divergence is minimised, and its share of the loss."""

    divergence: Divergence = "forward"
    temperature: float = 1.0
    sft_weight: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class WholeTeacher:
    """A teacher with all its probabilities.

    Attributes:
        hidden: [S, G].
        weight: [U or more, G] of its output head.
        bias: [U or more] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def compare(self, student: Tensor, chunk: slice, loss: DistilLoss) -> tuple[Tensor, Tensor]:
        """See `Teacher`; the kept mass is 1."""
        both = min(student.shape[1], len(self.weight))
        q = student[:, :both].log_softmax(-1) if both < student.shape[1] else student
        weight, bias = self.weight[:both], None if self.bias is None else self.bias[:both]
        p = _wide(F.linear(self.hidden[chunk], weight, bias)).div_(loss.temperature).log_softmax(-1)
        divergence, gradient = _DIVERGENCES[loss.divergence](p, q)
        entropy = -(p.exp() * p).sum(-1)
        agree = (p.argmax(-1) == q.argmax(-1)).to(q.dtype)
        if both < student.shape[1]:
            gradient = F.pad(gradient, (0, student.shape[1] - both))
        return torch.stack([divergence, entropy, torch.ones_like(entropy), agree]), gradient


@dataclass(frozen=True, eq=False)
class TopTeacher:
    """The teacher's most probable tokens, at the temperature of the loss; all others share one bucket.

    The divergence is then that between distributions over k + 1 outcomes, a lower bound of the whole one.

    Attributes:
        ids: int64 [S, k], the most probable first.
        log_probabilities: [S, k].
    """

    ids: Tensor
    log_probabilities: Tensor

    def compare(self, student: Tensor, chunk: slice, loss: DistilLoss) -> tuple[Tensor, Tensor]:
        """See `Teacher`; only the forward divergence is not biased."""
        assert loss.divergence == "forward"
        ids, p_log = self.ids[chunk], self.log_probabilities[chunk].to(student.dtype)
        p = p_log.exp()
        agree = (student.argmax(-1) == ids[:, 0]).to(p.dtype)
        q_log = student.gather(1, ids)
        q_rest_log = student.scatter_(1, ids, -math.inf).logsumexp(-1)  # not 1 - sum: that cancels
        kept = p.sum(-1)
        p_rest = (1 - kept).clamp(min=0) * q_rest_log.isfinite()  # stored values are rounded
        p_rest_log = p_rest.clamp(min=torch.finfo(p.dtype).tiny).log()
        rest = torch.where(p_rest > 0, p_rest * (p_rest_log - q_rest_log), 0.0)
        divergence = (p * (p_log - q_log)).sum(-1) + rest
        entropy = -(p * p_log).sum(-1) - p_rest * p_rest_log
        # q x (total mass of p) - p, where p gives each token of the bucket its share of q
        total = kept + p_rest
        share = torch.where(p_rest > 0, p_rest * (-q_rest_log).exp(), 0.0)
        gradient = student.exp_().mul_((total - share)[:, None])
        gradient.scatter_(1, ids, q_log.exp() * total[:, None] - p)
        return torch.stack([divergence, entropy, kept, agree]), gradient


def _forward(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    mass = p.exp()
    return (mass * (p - q)).sum(-1), q.exp().sub_(mass)


def _reverse(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    mass, gap = q.exp(), q - p
    divergence = (mass * gap).sum(-1)
    return divergence, gap.sub_(divergence[:, None]).mul_(mass)


def _jsd(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    middle = torch.logaddexp(p, q).sub_(math.log(2))
    of_teacher, _ = _forward(p, middle)
    of_student, gradient = _reverse(middle, q)
    return (of_teacher + of_student) / 2, gradient.div_(2)


_DIVERGENCES: Final = {"forward": _forward, "reverse": _reverse, "jsd": _jsd}
"""Each maps log-probabilities p and q, [c, U], to divergences [c] and their derivative by the student's logits."""


def distil_sums(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, teacher: Teacher, loss: DistilLoss
) -> Tensor:
    """Return sums over the supervised tokens, [5]; only the first has a gradient.

    Args:
        hidden: [S, H], the supervised positions.
        weight: [V, H] of the student's output head.
        bias: [V] or None.
        labels: [S] next-token ids.
        teacher: Its probabilities at these positions.
        loss: Divergence and weights.

    Returns:
        Loss, divergence, entropy of the teacher, kept mass, tokens that both models rank first; in fp64.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        sums: Tensor = ChunkedDivergence.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, labels, teacher, loss, torch.is_grad_enabled()
        )
    return sums


class ChunkedDivergence(torch.autograd.Function):
    """Computes gradients chunk by chunk in the forward pass, so that no logits wait for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher: Teacher,
        loss: DistilLoss,
        learns: bool,
    ) -> Tensor:
        """See `distil_sums`."""
        inputs = (hidden, weight, bias)
        sums = torch.zeros(5, dtype=torch.float64, device=hidden.device)
        # Sums over chunks and tokens, in fp32: unscaled gradients are below what fp16 can hold.
        gradients = [
            torch.zeros_like(tensor, dtype=_wide_type(tensor)) if tensor is not None and needed and learns else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        cast = weight.to(hidden.dtype)
        cast_bias = None if bias is None else bias.to(hidden.dtype)
        for first in range(0, len(hidden), CHUNK_TOKENS):
            chunk = slice(first, first + CHUNK_TOKENS)
            logits = _wide(F.linear(hidden[chunk], cast, cast_bias))
            values, by_logits = _chunk(logits, labels[chunk], teacher, chunk, loss)
            sums += values.double().sum(-1)
            _add_gradients(gradients, by_logits, hidden[chunk], cast, chunk)
        ctx.gradients = gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Scale what the forward pass computed by the gradient of the loss, in place: it runs once."""
        saved, ctx.gradients = ctx.gradients, None
        scaled = (
            None if each is None else each.mul_(gradient[0].to(each.dtype)).to(dtype)
            for each, dtype in zip(saved, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)


def _chunk(logits: Tensor, labels: Tensor, teacher: Teacher, chunk: slice, loss: DistilLoss) -> tuple[Tensor, Tensor]:
    """Return loss and figures, [5, c], and the derivative of the loss with respect to the logits, [c, V]."""
    figures, gradient = teacher.compare((logits / loss.temperature).log_softmax(-1), chunk, loss)
    losses = figures[0] * loss.weight * loss.temperature**2
    gradient *= loss.weight * loss.temperature
    if loss.sft_weight:
        log_probabilities = logits.log_softmax(-1)
        here = labels[:, None]
        losses = losses - loss.sft_weight * log_probabilities.gather(1, here)[:, 0]
        gradient.add_(log_probabilities.exp_(), alpha=loss.sft_weight)
        gradient.scatter_add_(1, here, torch.full_like(here, -loss.sft_weight, dtype=gradient.dtype))
    return torch.cat([losses[None], figures]), gradient


def _add_gradients(
    gradients: list[Tensor | None], by_logits: Tensor, hidden: Tensor, weight: Tensor, chunk: slice
) -> None:
    """Add what a chunk gives to the gradients of hidden states, weight and bias."""
    of_hidden, of_weight, of_bias = gradients
    # fp16 has no room for the probabilities of rare tokens, which bf16 has.
    kind = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    factor = by_logits.to(kind)
    if of_hidden is not None:
        of_hidden[chunk] = factor @ weight.to(kind)
    if of_weight is not None:
        of_weight += factor.T @ hidden.to(kind)
    if of_bias is not None:
        of_bias += by_logits.sum(0)


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_type(tensor))
