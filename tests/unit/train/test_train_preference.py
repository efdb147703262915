"""Losses of pairs do not depend on packing, order or micro-batches, and behave at their ends."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from packhorse.recipe.objectives import (
    CpoObjective,
    DpoObjective,
    IpoObjective,
    KtoObjective,
    OrpoObjective,
    RewardObjective,
    SimpoObjective,
)
from packhorse.train.objectives.preference import implicit_reward, make_objective, pair_losses
from packhorse.train.objectives.unit_losses import Answers
from preference_cases import CPU, OneProcess, micro_batch, packed, policy_of, reference_of

SECTIONS: dict[str, Any] = {
    "dpo": DpoObjective(),
    "ipo": IpoObjective(),
    "cpo": CpoObjective(),
    "simpo": SimpoObjective(),
    "orpo": OrpoObjective(),
    "kto": KtoObjective(),
    "reward": RewardObjective(),
}
PAIR_SECTIONS = {name: section for name, section in SECTIONS.items() if name not in ("kto", "reward")}
# Prompt and both answers of each row.
LENGTHS = ((5, 7, 4), (2, 3, 9), (1, 1, 2), (8, 6, 6))


def documents() -> list[tuple[list[int], list[int], int]]:
    """Both documents of each row, and the number of prompt tokens."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(5, 97, (length,), generator=generator).tolist()

    rows = []
    for prompt_length, chosen, rejected in LENGTHS:
        prompt = ids(prompt_length)
        rows.append((prompt + ids(chosen), prompt + ids(rejected), prompt_length))
    return rows


def gradients_of(section: Any, cut: list[list[int]]) -> tuple[float, dict[str, Tensor]]:
    """Sum of losses and its gradients, with these rows in each micro-batch."""
    is_reward = isinstance(section, RewardObjective)
    policy, reference = policy_of(AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM)
    batches = []
    for rows in cut:
        pairs = [documents()[row] for row in rows]
        ids, starts = [each for pair in pairs for each in pair[:2]], [pair[2] for pair in pairs for _ in range(2)]
        values = {"verdict": torch.tensor([row % 2 for row in rows for _ in range(2)])}
        if section.needs_reference:
            values["reference"] = reference_of(reference, ids, starts)
        batches.append(micro_batch(ids, starts, **values))
    model = packed(policy).train()
    objective = make_objective(section).for_step(OneProcess(model), batches, None)
    total = 0.0
    for batch in batches:
        loss = objective(model, batch, CPU).total
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", SECTIONS)
@settings(max_examples=4, deadline=None)
@given(order=st.permutations(range(len(LENGTHS))), cuts=st.sets(st.integers(1, len(LENGTHS) - 1)))
def test_any_order_and_any_micro_batches_give_one_gradient(name: str, order: list[int], cuts: set[int]) -> None:
    ends = [0, *sorted(cuts), len(order)]
    cut = [list(order[first:end]) for first, end in pairwise(ends)]
    alone_total, alone = gradients_of(SECTIONS[name], [[row] for row in range(len(LENGTHS))])
    total, gradients = gradients_of(SECTIONS[name], cut)
    assert total == pytest.approx(alone_total, rel=1e-5)
    for key, gradient in alone.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[key], gradient, atol=1e-5 * scale, rtol=1e-4, msg=key)


def answers(logp: float, num_tokens: int, reference: float) -> Answers:
    return Answers(*(torch.tensor([value], dtype=torch.float64) for value in (logp, num_tokens, reference)))


@pytest.mark.parametrize("name", PAIR_SECTIONS)
@given(*[st.floats(-2000, -0.01) for _ in range(4)], *[st.integers(1, 300) for _ in range(2)])
def test_swapped_answers_turn_the_margin_and_all_is_finite(
    name: str, first: float, second: float, third: float, fourth: float, long: int, short: int
) -> None:
    section = PAIR_SECTIONS[name]
    one, other = answers(first, long, second), answers(third, short, fourth)
    margins = [implicit_reward(section, a) - implicit_reward(section, b) for a, b in ((one, other), (other, one))]
    assert margins[0] == -margins[1]
    leaf = one.logp.clone().requires_grad_()
    loss = pair_losses(section, Answers(leaf, one.num_tokens, one.reference), other).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad.item() <= 0 or name == "ipo", "a likelier chosen answer may not cost more"


def test_dpo_pulls_by_half_of_beta_where_it_starts() -> None:
    chosen, rejected = answers(-40.0, 9, -40.0), answers(-55.0, 7, -55.0)
    for beta in (0.01, 0.1, 1.0):
        leaf = chosen.logp.clone().requires_grad_()
        loss = pair_losses(DpoObjective(beta=beta), Answers(leaf, chosen.num_tokens, chosen.reference), rejected)
        loss.sum().backward()
        assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
        assert leaf.grad is not None
        assert leaf.grad.item() == pytest.approx(-beta / 2)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_micro_batch_without_rows_reaches_every_weight_with_zero(name: str) -> None:
    total, gradients = gradients_of(SECTIONS[name], [[]])
    assert total == 0.0
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())
