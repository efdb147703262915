"""The `objective` section: the loss of a run, and the rows that it takes.

Class attributes answer what data, plan and training ask of an objective; `kind` appears nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt

from packhorse.yaml_source.schema import PositiveFloat, Section

RowFormat = Literal[
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "text_label",
    "text",
    "preference",
    "kto",
    "ranked",
    "rated",
    "tree",
]
RowKind = Literal["answers", "pairs", "verdicts"]
"""Rows with answers to imitate, with a chosen and a rejected answer, or with one answer and whether it is good."""
KIND_OF: Final[Mapping[RowFormat, RowKind]] = {
    "preference": "pairs",
    "ranked": "pairs",
    "kto": "verdicts",
    "rated": "verdicts",
}
Unit = Literal["token", "pair", "answer"]
"""What a step's loss is the mean of."""
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ReferenceSection(Section):
    """Another reference model than the one before step 1: exactly one of `id` and `path`."""

    id: str | None = None
    """Name on the Hugging Face hub, e.g. `meta-llama/Llama-3.1-8B-Instruct`."""
    path: str | None = None
    """Local folder in Hugging Face form, or the folder of an earlier run of full fine-tuning."""
    revision: str | None = None
    """Commit, tag or branch of `id`."""


class TeacherModel(Section):
    """The teacher of a distillation: exactly one of `id` and `path`."""

    id: str | None = None
    """Name on the Hugging Face hub, e.g. `Qwen/Qwen3-8B`."""
    path: str | None = None
    """Local folder in Hugging Face form, or the folder of an earlier run."""
    revision: str | None = None
    """Commit, tag or branch of `id`."""


class TokenObjective(Section):
    """Base of the objectives whose loss is a mean over supervised tokens."""

    takes: ClassVar[RowKind] = "answers"
    unit: ClassVar[Unit] = "token"
    documents_per_row: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False


class SftObjective(TokenObjective):
    """Cross-entropy of each supervised token: supervised fine-tuning."""

    kind: Literal["sft"] = "sft"


class DistilObjective(TokenObjective):
    """Divergence from a teacher at each supervised token (Hinton et al. 2015, arXiv 1503.02531)."""

    kind: Literal["distil"] = "distil"
    teacher: TeacherModel
    """Model to learn from, with the same tokenizer."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """KL(teacher || student), KL(student || teacher), or the Jensen-Shannon divergence."""
    temperature: PositiveFloat = 1.0
    """Divisor of both models' logits; the loss is multiplied by its square, so that gradients keep their size."""
    top: PositiveInt | Literal["all"] = 64
    """Most probable tokens of the teacher, stored before training; `all`: the teacher runs beside the student."""
    sft_weight: Weight = 0.0
    """Weight of the cross-entropy that is added to the divergence."""


class PairedObjective(Section):
    """Base of the objectives that compare the two documents of a row."""

    takes: ClassVar[RowKind] = "pairs"
    unit: ClassVar[Unit] = "pair"
    documents_per_row: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = False


class DpoObjective(PairedObjective):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    needs_reference: ClassVar[bool] = True
    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference model."""
    loss: Literal["sigmoid", "hinge", "robust", "apo_zero"] = "sigmoid"
    """Loss of a margin: DPO's, SLiC's hinge, robust DPO (arXiv 2403.00409), or APO-zero (arXiv 2408.06266)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs whose order is assumed to be wrong; for `sigmoid` and `robust`."""
    sft_weight: Weight = 0.0
    """Weight of the cross-entropy of the chosen answer, per token (RPO)."""
    reference: Literal["start"] | ReferenceSection = "start"
    """Reference model: the model before step 1, or another."""


class IpoObjective(PairedObjective):
    """Identity preference optimisation, per token (Azar et al. 2023, arXiv 2310.12036)."""

    needs_reference: ClassVar[bool] = True
    kind: Literal["ipo"] = "ipo"
    tau: PositiveFloat = 0.1
    """Strength of the pull towards the reference model."""
    reference: Literal["start"] | ReferenceSection = "start"
    """Reference model: the model before step 1, or another."""


class KtoObjective(PairedObjective):
    """Single answers that are good or bad (Ethayarajh et al. 2024, arXiv 2402.01306).

    The second document of a row is its prompt with another row's answer: the baseline of the KL divergence.
    """

    takes: ClassVar[RowKind] = "verdicts"
    unit: ClassVar[Unit] = "answer"
    needs_reference: ClassVar[bool] = True
    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference model."""
    desirable_weight: Weight = 1.0
    """Weight of good answers."""
    undesirable_weight: Weight = 1.0
    """Weight of bad answers."""
    reference: Literal["start"] | ReferenceSection = "start"
    """Reference model: the model before step 1, or another."""


class OrpoObjective(PairedObjective):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691)."""

    kind: Literal["orpo"] = "orpo"
    weight: PositiveFloat = 0.1
    """Weight of the odds ratio; the cross-entropy of the chosen answer has weight 1."""


class SimpoObjective(PairedObjective):
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734)."""

    kind: Literal["simpo"] = "simpo"
    beta: PositiveFloat = 2.0
    """Scale of the log-probability per token."""
    gamma: Weight = 0.5
    """Margin that the chosen answer must lead by (the paper's gamma)."""


class CpoObjective(PairedObjective):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417)."""

    kind: Literal["cpo"] = "cpo"
    beta: PositiveFloat = 0.1
    """Scale of the log-probabilities."""
    sft_weight: Weight = 1.0
    """Weight of the cross-entropy of the chosen answer, per token."""


class RewardObjective(PairedObjective):
    """A reward model: a head gives each answer a score (Bradley-Terry)."""

    kind: Literal["reward"] = "reward"
    centre: Weight = 0.01
    """Weight of the squared sum of both scores, which keeps scores around 0."""


def _kind_alone(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


Objective = Annotated[
    SftObjective
    | DpoObjective
    | IpoObjective
    | KtoObjective
    | OrpoObjective
    | SimpoObjective
    | CpoObjective
    | RewardObjective
    | DistilObjective,
    Discriminator("kind"),
    BeforeValidator(_kind_alone),
]


def row_kind(row_format: RowFormat) -> RowKind:
    """Return what the rows of a format have."""
    return KIND_OF.get(row_format, "answers")
