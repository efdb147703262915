"""Preference objectives beside TRL's trainers: equal loss and gradient norm of a step on equal ids.

The policy differs from the reference: against a fresh copy DPO's loss is log 2, whatever is packed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from golden import exact_norm
from packhorse.quickstart.files import materialise
from packhorse.recipe.objectives import (
    CpoObjective,
    DpoObjective,
    IpoObjective,
    KtoObjective,
    OrpoObjective,
    RewardObjective,
    SimpoObjective,
)
from packhorse.train.objectives.preference import make_objective
from preference_cases import CPU, OneProcess, micro_batch, packed, policy_of, reference_of

TOLERANCE = 1e-5
PAIRS = 8
Row = dict[str, list[int]]


def drawn_rows(fewest: int = 3, most: int = 20) -> list[Row]:
    """Rows of ids 5 to 96, with so many tokens in a prompt.

    Chosen answers are equally long: TRL's loss on them is a mean over all their tokens. KTO's mismatched answers are
    those of the row before.
    """
    generator = np.random.default_rng(7)

    def ids(low: int, high: int) -> list[int]:
        return generator.integers(5, 97, generator.integers(low, high + 1)).tolist()

    rows = [{"prompt": ids(fewest, most), "chosen": ids(12, 12), "rejected": ids(4, 24)} for _ in range(PAIRS)]
    return [row | {"mismatched": rows[at - 1]["chosen"]} for at, row in enumerate(rows)]


def of_pairs(rows: list[Row], second: str = "rejected") -> tuple[list[list[int]], list[int]]:
    documents = [row["prompt"] + row[role] for row in rows for role in ("chosen", second)]
    return documents, [len(row["prompt"]) for row in rows for _ in range(2)]


def of_ours(
    section: Any, policy: nn.Module, reference: nn.Module, rows: list[Row], **values: torch.Tensor
) -> tuple[float, float]:
    """Loss and gradient norm of one packed step."""
    documents, starts = of_pairs(rows, "mismatched" if isinstance(section, KtoObjective) else "rejected")
    if section.needs_reference:
        values["reference"] = reference_of(reference, documents, starts)
    batch = micro_batch(documents, starts, **values)
    model = packed(policy).train()
    objective = make_objective(section).for_step(OneProcess(model), [batch], None)
    total = objective(model, batch, CPU).total / len(rows)
    total.backward()
    return float(total.detach()), exact_norm(list(model.parameters()))


def of_trl(
    trainer_class: Any, config_class: Any, policy: nn.Module, folder: Path, rows: list[dict[str, Any]], **words: Any
) -> tuple[float, float]:
    """Loss and gradient norm of one step of a TRL trainer over all rows, whose ids are given."""
    reference = words.pop("reference", None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(materialise("tokenizer", folder / "builtin"))
    with rows_as_given(trainer_class):
        settings = config_class(
            output_dir=str(folder),
            max_steps=1,
            per_device_train_batch_size=len(rows),
            max_length=None,
            max_grad_norm=1e9,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **words,
        )
        trainer = trainer_class(
            model=deepcopy(policy),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **({} if reference is None else {"ref_model": deepcopy(reference)}),
        )
        done = trainer.train()
    return done.training_loss, trainer.state.log_history[0]["grad_norm"]


@contextmanager
def rows_as_given(trainer_class: Any) -> Iterator[None]:
    """TRL tokenises nothing."""
    prepared = partial(mock.patch.object, trainer_class, "_prepare_dataset", create=True)
    with (
        mock.patch.object(Dataset, "map", lambda self, *_, **__: self),
        prepared(lambda _, rows, *__, **___: rows),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # TRL's, about its own future
        yield


def pair_columns(row: Row) -> dict[str, list[int]]:
    """Columns of DPOTrainer."""
    return {f"{role}_ids": row[role] for role in ("prompt", "chosen", "rejected")}


def older_columns(row: Row) -> dict[str, list[int]]:
    """Columns of ORPOTrainer and CPOTrainer."""
    columns = {"prompt_input_ids": row["prompt"], "prompt_attention_mask": [1] * len(row["prompt"])}
    for role in ("chosen", "rejected"):
        ids = row["prompt"] + row[role]
        columns |= {
            f"{role}_input_ids": ids,
            f"{role}_attention_mask": [1] * len(ids),
            f"{role}_labels": [-100] * len(row["prompt"]) + row[role],
        }
    return columns


VERDICTS = (True, False, True, True, False, True, False, False)
MARGINS = tuple(number / 10 for number in range(PAIRS))


def verdict_columns(row: Row) -> dict[str, Any]:
    """Columns of KTOTrainer."""
    return {"prompt_ids": row["prompt"], "completion_ids": row["chosen"], "KL_completion_ids": row["mismatched"]}


def score_columns(row: Row) -> dict[str, Any]:
    """Columns of RewardTrainer."""
    return {f"{role}_ids": row["prompt"] + row[role] for role in ("chosen", "rejected")}


@dataclass(frozen=True)
class Case:
    """An objective, and the same in TRL's words.

    Attributes:
        section: The recipe's `objective`.
        trainer: Name of TRL's trainer.
        columns: Columns of its rows.
        words: Its settings.
        swapped: Policy and reference change places, so that KTO's baseline is clamped to 0.
        prompt_tokens: Fewest and most tokens of a prompt. TRL's ORPO also learns prompts, of which the first token has
            no loss.
    """

    section: Any
    trainer: str
    columns: Callable[[Row], dict[str, Any]] = pair_columns
    words: dict[str, Any] = field(default_factory=dict)
    swapped: bool = False
    prompt_tokens: tuple[int, int] = (3, 20)


KTO = KtoObjective(beta=0.2, desirable_weight=1.3, undesirable_weight=0.7)
KTO_WORDS = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7}
RPO = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5}
CASES = {
    "dpo": Case(DpoObjective(beta=0.3), "DPO", words={"beta": 0.3}),
    "dpo, hinge": Case(DpoObjective(loss="hinge"), "DPO", words={"loss_type": "hinge"}),
    "dpo, robust": Case(
        DpoObjective(loss="robust", label_smoothing=0.2), "DPO", words={"loss_type": "robust", "label_smoothing": 0.2}
    ),
    "dpo, apo_zero": Case(DpoObjective(loss="apo_zero"), "DPO", words={"loss_type": "apo_zero"}),
    "dpo and sft": Case(DpoObjective(sft_weight=0.5), "DPO", words=RPO),
    "ipo": Case(IpoObjective(tau=0.2), "DPO", words={"loss_type": "ipo", "beta": 0.2}),
    "cpo": Case(CpoObjective(), "CPO", older_columns),
    "simpo": Case(SimpoObjective(), "CPO", older_columns, SIMPO),
    "orpo": Case(OrpoObjective(), "ORPO", older_columns, prompt_tokens=(1, 1)),
    "kto": Case(KTO, "KTO", verdict_columns, KTO_WORDS),
    "kto, baseline 0": Case(KTO, "KTO", verdict_columns, KTO_WORDS, swapped=True),
    "reward": Case(RewardObjective(centre=0.01), "Reward", score_columns, {"center_rewards_coefficient": 0.01}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_trls(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    rows = drawn_rows(*case.prompt_tokens)
    is_reward = isinstance(case.section, RewardObjective)
    models = policy_of(AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM)
    policy, reference = models[::-1] if case.swapped else models
    given, values = [case.columns(row) for row in rows], {}
    if case.trainer == "KTO":
        given = [row | {"label": verdict} for row, verdict in zip(given, VERDICTS, strict=True)]
        values["verdict"] = torch.tensor(VERDICTS).repeat_interleave(2)
    if is_reward:
        given = [row | {"margin": margin} for row, margin in zip(given, MARGINS, strict=True)]
        values["margin"] = torch.tensor(MARGINS).repeat_interleave(2)
    words = case.words | ({"reference": reference} if case.section.needs_reference else {})
    expected = of_trl(*trl_classes(case.trainer), policy, tmp_path, given, **words)
    assert of_ours(case.section, policy, reference, rows, **values) == pytest.approx(expected, rel=TOLERANCE)


def trl_classes(name: str) -> tuple[Any, Any]:
    """A trainer and its settings; imported here, because other tests of this folder run without TRL."""
    folder = f"trl.experimental.{name.lower()}" if name in ("CPO", "ORPO") else "trl"
    module = import_module(folder)
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
