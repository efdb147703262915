"""Rules on distillation: its teacher, and what a stored teacher can be compared by."""

from __future__ import annotations

from collections.abc import Iterator

from packhorse.recipe.objectives import DistilObjective
from packhorse.recipe.schema import Recipe
from packhorse.yaml_source.findings import Finding


def distil_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield the rules on `objective` that a distillation breaks."""
    section = recipe.objective
    if not isinstance(section, DistilObjective):
        return
    yield from _teacher_rules(section)
    if section.top != "all" and section.divergence != "forward":
        yield Finding(
            (("objective", "top"), ("objective", "divergence")),
            f"objective.divergence is {section.divergence}, and objective.top is {section.top}.",
            "it weighs tokens by the student's probabilities, and the stored tokens of the teacher lack most of these: "
            "the gradient would be biased.",
            "set objective.top: all, or objective.divergence: forward",
        )


def _teacher_rules(section: DistilObjective) -> Iterator[Finding]:
    teacher = section.teacher
    given = [name for name in ("id", "path") if getattr(teacher, name) is not None]
    if len(given) != 1:
        yield Finding(
            (("objective", "teacher", "id"), ("objective", "teacher", "path")),
            f"objective.teacher gives {' and '.join(given) or 'neither id nor path'}.",
            "the student learns from one model.",
            "give objective.teacher.id (hub) or objective.teacher.path (a local folder or an earlier run)",
        )
    if teacher.revision is not None and teacher.id is None:
        yield Finding(
            (("objective", "teacher", "revision"),),
            f"objective.teacher.revision is {teacher.revision}, but there is no objective.teacher.id.",
            "a revision is a commit of a model on the hub.",
            "remove it, or name the model by objective.teacher.id",
        )
