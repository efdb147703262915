"""Preference objectives: pairs of answers (dpo, ipo, orpo, simpo, cpo), verdicts (kto), scores (reward).

Shapes: D documents of a micro-batch, U units in it. Documents 2u and 2u + 1 belong to unit u: the chosen and the
rejected answer; for kto the answer, and another row's answer to the same prompt, which only measures the KL divergence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from packhorse.data.packs.loader import MicroBatch
from packhorse.model.sequence import SequenceGroup
from packhorse.recipe.objectives import (
    CpoObjective,
    DpoObjective,
    IpoObjective,
    KtoObjective,
    OrpoObjective,
    RewardObjective,
    SimpoObjective,
)
from packhorse.recipe.objectives import (
    Objective as ObjectiveSection,
)
from packhorse.train.engine.engine import Engine
from packhorse.train.objectives.documents import document_scores, log_probabilities
from packhorse.train.objectives.objective import MicroBatchLoss, Objective, OfMicroBatch, TokenObjective
from packhorse.train.objectives.unit_losses import (
    Answers,
    cpo_losses,
    dpo_losses,
    ipo_losses,
    kl_baseline,
    kto_losses,
    log_odds_ratio,
    orpo_losses,
    reward_losses,
    simpo_losses,
)

CHOSEN, REJECTED = slice(0, None, 2), slice(1, None, 2)
ANSWER, MISMATCHED = CHOSEN, REJECTED
ROUNDING = 1e-6

ANSWER_FIGURES = ("chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
PER_TOKEN_FIGURES = ("chosen_logp_per_token", "rejected_logp_per_token")

PairSection = DpoObjective | IpoObjective | CpoObjective | SimpoObjective | OrpoObjective


def make_objective(section: ObjectiveSection) -> Objective:
    """Return what computes the losses of the recipe's `objective`."""
    match section:
        case DpoObjective() | IpoObjective() | CpoObjective() | SimpoObjective() | OrpoObjective():
            return PairObjective(section)
        case KtoObjective():
            return VerdictObjective(section)
        case RewardObjective():
            return ScoreObjective(section)
        case _:
            return TokenObjective()


@dataclass(frozen=True)
class PairObjective(OfMicroBatch):
    """Losses of pairs from the log-probabilities of their answers.

    Attributes:
        section: The recipe's `objective`.
    """

    section: PairSection

    def __call__(
        self, model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None = None
    ) -> MicroBatchLoss:
        """Return the sum of the losses of the micro-batch's pairs."""
        documents = log_probabilities(model, micro_batch, device, sequence)
        reference = _reference(micro_batch, device, self.section.needs_reference)

        def answers(logp: Tensor) -> tuple[Answers, Answers]:
            chosen, rejected = (
                Answers(logp[role], documents.num_tokens[role], reference[role]) for role in (CHOSEN, REJECTED)
            )
            return chosen, rejected

        total = documents.differentiable(lambda logp: pair_losses(self.section, *answers(logp)))
        return MicroBatchLoss(total, self._figures(*answers(documents.whole)))

    def _figures(self, chosen: Answers, rejected: Answers) -> dict[str, Tensor]:
        rewards = [implicit_reward(self.section, answers) for answers in (chosen, rejected)]
        margin = rewards[0] - rewards[1]
        figures = {"preference/accuracy": wins(margin), "preference/margin": margin}
        values = [*rewards, chosen.logp, rejected.logp, chosen.logp_per_token, rejected.logp_per_token]
        figures |= {f"preference/{name}": each for name, each in zip(ANSWER_FIGURES + PER_TOKEN_FIGURES, values)}
        if self.section.needs_reference:
            figures["preference/kl"] = chosen.log_ratio
        if isinstance(self.section, OrpoObjective):
            figures |= {"orpo/log_odds": log_odds_ratio(chosen, rejected), "orpo/nll": -chosen.logp_per_token}
        return {name: sum_and_number(each) for name, each in figures.items()}


def pair_losses(section: PairSection, chosen: Answers, rejected: Answers) -> Tensor:
    """Return the losses [U] of pairs under the recipe's `objective`."""
    match section:
        case DpoObjective():
            return dpo_losses(chosen, rejected, section.beta, section.loss, section.label_smoothing, section.sft_weight)
        case IpoObjective():
            return ipo_losses(chosen, rejected, section.tau)
        case CpoObjective():
            return cpo_losses(chosen, rejected, section.beta, section.sft_weight)
        case SimpoObjective():
            return simpo_losses(chosen, rejected, section.beta, section.gamma)
        case OrpoObjective():
            return orpo_losses(chosen, rejected, section.weight)


def implicit_reward(section: PairSection, answers: Answers) -> Tensor:
    """Return the reward [U] that the objective compares, up to a term that both answers share."""
    match section:
        case DpoObjective():
            return section.beta * answers.log_ratio
        case IpoObjective():
            return section.tau * answers.log_ratio / answers.num_tokens
        case CpoObjective():
            return section.beta * answers.logp
        case SimpoObjective():
            return section.beta * answers.logp_per_token
        case OrpoObjective():
            return section.weight * answers.logp_per_token


@dataclass(frozen=True)
class VerdictObjective:
    """KTO's losses of single answers.

    Attributes:
        section: The recipe's `objective`.
        baseline: KL baseline z0 of the step, nats.
    """

    section: KtoObjective
    baseline: float = 0.0

    def __call__(
        self, model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None = None
    ) -> MicroBatchLoss:
        """Return the sum of the losses of the micro-batch's answers."""
        documents = log_probabilities(model, micro_batch, device, sequence)
        reference = _reference(micro_batch, device, True)
        good = required_column(micro_batch, "verdict", device)[ANSWER] > 0
        beta, weights = self.section.beta, (self.section.desirable_weight, self.section.undesirable_weight)

        def losses_of(logp: Tensor) -> Tensor:
            return kto_losses((logp - reference)[ANSWER], good, self.baseline, beta, weights)

        total = documents.differentiable(losses_of)
        logp, log_ratio = documents.whole[ANSWER], (documents.whole - reference)[ANSWER]
        figures = {
            "preference/accuracy": sum_and_number(((log_ratio > self.baseline) == good).double()),
            "preference/kl": sum_and_number(log_ratio),
            "kto/z0": sum_and_number(torch.full_like(log_ratio, self.baseline)),
        }
        values = [(beta * log_ratio, good), (beta * log_ratio, ~good), (logp, good), (logp, ~good)]
        for name, (each, counted) in zip(ANSWER_FIGURES, values, strict=True):
            figures[f"preference/{name}"] = torch.stack([(each * counted).sum(), counted.double().sum()])
        return MicroBatchLoss(total, figures)

    def for_step(
        self, engine: Engine, micro_batches: Iterable[MicroBatch], sequence: SequenceGroup | None
    ) -> VerdictObjective:
        """Return the objective with the step's KL baseline, equal for every number of ranks and micro-batches."""
        sums = [0.0, 0.0]
        with torch.no_grad():
            for micro_batch in micro_batches:
                documents = log_probabilities(engine.model, micro_batch, engine.device, sequence)
                mismatched = (documents.whole - _reference(micro_batch, engine.device, True))[MISMATCHED]
                sums = [sums[0] + float(mismatched.sum()), sums[1] + len(mismatched)]
        return replace(self, baseline=kl_baseline(*engine.sum_over_ranks(sums)))


@dataclass(frozen=True)
class ScoreObjective(OfMicroBatch):
    """Losses of pairs from the scores of a reward model.

    Attributes:
        section: The recipe's `objective`.
    """

    section: RewardObjective

    def __call__(
        self, model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None = None
    ) -> MicroBatchLoss:
        """Return the sum of the losses of the micro-batch's pairs."""
        documents = document_scores(model, micro_batch, device, sequence)
        margin = column(micro_batch, "margin", device)
        margin = margin[CHOSEN] if margin is not None else None
        centre = self.section.centre
        total = documents.differentiable(lambda each: reward_losses(each[CHOSEN], each[REJECTED], margin, centre))
        gap = documents.whole[CHOSEN] - documents.whole[REJECTED]
        figures = {
            "reward/accuracy": wins(gap),
            "reward/margin": gap,
            "reward/mean": documents.whole,
        }
        return MicroBatchLoss(total, {name: sum_and_number(each) for name, each in figures.items()})


def wins(margin: Tensor) -> Tensor:
    """Return 1 where the model prefers the chosen answer, 0 where the other; half a win where only rounding differs."""
    return (margin > ROUNDING).double() / 2 + (margin >= -ROUNDING).double() / 2


def sum_and_number(values: Tensor) -> Tensor:
    """Return sum and number of values, float64 [2]."""
    return torch.stack([values.sum(), values.new_tensor(float(len(values)))])


def _reference(micro_batch: MicroBatch, device: torch.device, needed: bool) -> Tensor:
    """Return the log-probability of each document under the reference model, float64 [D]; zeros without such."""
    if not needed:
        return torch.zeros(len(micro_batch.documents), dtype=torch.float64, device=device)
    return required_column(micro_batch, "reference", device)


def required_column(micro_batch: MicroBatch, name: str, device: torch.device) -> Tensor:
    """Return a number of each document, float64 [D]."""
    found = column(micro_batch, name, device)
    assert found is not None, f"the rows have no {name}"
    return found


def column(micro_batch: MicroBatch, name: str, device: torch.device) -> Tensor | None:
    """Return a number of each document, float64 [D]; None where the rows have none of this name."""
    if micro_batch.values is None or name not in micro_batch.value_names:
        return None
    return micro_batch.values[:, micro_batch.value_names.index(name)].to(device, non_blocking=True)
