"""Distillation: the loss is the divergence from a teacher, whose tokens are stored or which runs beside the student."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from packhorse.data.packs.loader import MicroBatch, part_of_row
from packhorse.model.sequence import SequenceGroup
from packhorse.recipe.objectives import DistilObjective as DistilSection
from packhorse.train.objectives.divergence import DistilLoss, Teacher, TopTeacher, WholeTeacher, distil_sums
from packhorse.train.objectives.forward import model_inputs
from packhorse.train.objectives.objective import MicroBatchLoss, OfMicroBatch
from packhorse.train.objectives.token_loss import head_loss

FIGURES: Final = (
    "distil/divergence",
    "distil/teacher_entropy",
    "distil/kept_mass",
    "distil/top1_agreement",
)


@dataclass(frozen=True)
class DistilObjective(OfMicroBatch):
    """Divergence from the teacher at each supervised token, and cross-entropy with `sft_weight`.

    Attributes:
        loss: Divergence and its share of the loss.
        teacher: Teacher that runs beside the student, with its loss head installed; None where micro-batches hold its
            most probable tokens.
    """

    loss: DistilLoss
    teacher: nn.Module | None

    def __call__(
        self, model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None = None
    ) -> MicroBatchLoss:
        """Return the sum over the micro-batch's supervised tokens, of this rank's part of a shared row."""
        own = micro_batch
        if sequence is not None and own.num_parts == 1:
            own = part_of_row(own, sequence.rank, sequence.size)
        inputs, positions = model_inputs(own, device, sequence), own.predicting.to(device, non_blocking=True)
        labels = own.targets.to(device, non_blocking=True)

        def student(teacher: Teacher) -> Tensor:
            sums = partial(distil_sums, labels=labels, teacher=teacher, loss=self.loss)
            return head_loss(model, inputs, positions, sums)

        if self.teacher is None:
            assert own.teacher_ids is not None
            assert own.teacher_logps is not None
            ids, logps = (stored.to(device, non_blocking=True) for stored in (own.teacher_ids, own.teacher_logps))
            sums = student(TopTeacher(ids, logps))
        else:
            learns = torch.is_grad_enabled()

            def beside(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                with torch.set_grad_enabled(learns):
                    return student(WholeTeacher(hidden, weight, bias))

            # The student runs inside the teacher's head: only there is a sharded teacher's head whole.
            with torch.no_grad():
                sums = head_loss(self.teacher, inputs, positions, beside)
        number = torch.full_like(sums[0].detach(), len(labels))
        figures = {name: torch.stack([sums[index].detach(), number]) for index, name in enumerate(FIGURES, start=1)}
        return MicroBatchLoss(sums[0].float(), figures)


def distil_objectives(section: DistilSection, teacher: nn.Module | None) -> tuple[DistilObjective, DistilObjective]:
    """Return the objective of training, and that of evaluation.

    The loss of evaluation is cross-entropy, as that of other runs; the divergence is one of its figures.
    """
    loss = DistilLoss(section.divergence, section.temperature, section.sft_weight)
    return DistilObjective(loss, teacher), DistilObjective(replace(loss, weight=0.0, sft_weight=1.0), teacher)
