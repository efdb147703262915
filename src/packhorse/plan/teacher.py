"""The teacher of a distillation in the plan."""

from __future__ import annotations

from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan, TeacherFacts, Topology
from packhorse.recipe.methods import FullMethod
from packhorse.recipe.objectives import DistilObjective
from packhorse.recipe.schema import Recipe
from packhorse.recipe.teacher import teacher_of


def teacher_facts(recipe: Recipe) -> TeacherFacts | None:
    """Return where the weights of the recipe's teacher are; None without a teacher.

    Raises:
        UserError: The teacher is a run that has not finished.
    """
    if not isinstance(recipe.objective, DistilObjective):
        return None
    model, adapter = teacher_of(recipe)
    return TeacherFacts(model=model, adapter=adapter)


def check_teacher(recipe: Recipe, topology: Topology) -> None:
    """Refuse a teacher beside the student where the engine cannot run both.

    Raises:
        UserError: `objective.top` is all, and the engine is DeepSpeed or ranks share each pack.
    """
    section = recipe.objective
    if not isinstance(section, DistilObjective) or section.top != "all":
        return
    if topology.engine.startswith("zero"):
        raise UserError(
            f"objective.top is all, and parallel.engine is {topology.engine}.",
            "DeepSpeed holds one model per process, and the teacher would run beside the student.",
            "set objective.top: 64, so that the teacher runs before training; or parallel.engine: fsdp2.",
        )
    if topology.sequence > 1:
        raise UserError(
            f"objective.top is all, and parallel.sequence is {topology.sequence}.",
            "a teacher beside the student would need its heads divided in the same way.",
            "set objective.top: 64, or parallel.sequence: 1.",
        )


def teacher_plan(plan: RunPlan) -> RunPlan:
    """Return the plan with the teacher as base model, so that it is loaded as a base model is."""
    assert plan.teacher is not None
    model = plan.teacher.model
    recipe = plan.recipe.model_copy(update={"model": model, "method": FullMethod()})
    return plan.model_copy(update={"recipe": recipe, "base_model": model.path or model.id})
