"""The `objective` section: what a run minimises."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt

from packhorse.yaml_source.schema import PositiveFloat, Section


class SftObjective(Section):
    """Cross-entropy of each supervised token."""

    kind: Literal["sft"] = "sft"


class TeacherModel(Section):
    """The teacher of a distillation: exactly one of `id` and `path`."""

    id: str | None = None
    """Name on the Hugging Face hub, e.g. `Qwen/Qwen3-8B`."""
    path: str | None = None
    """Local folder in Hugging Face form, or the folder of an earlier run."""
    revision: str | None = None
    """Commit, tag or branch of `id`."""


class DistilObjective(Section):
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
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy that is added to the divergence."""


Objective = Annotated[
    SftObjective | DistilObjective,
    BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value),
    Discriminator("kind"),
]
