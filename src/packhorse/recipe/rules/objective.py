"""Rules on `objective`: settings that it cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from packhorse.recipe.methods import LoraMethod, PrefixTuningMethod, PromptTuningMethod
from packhorse.recipe.objectives import (
    DistilObjective,
    DpoObjective,
    KtoObjective,
    PairedObjective,
    ReferenceSection,
    TeacherModel,
)
from packhorse.recipe.schema import Recipe
from packhorse.yaml_source.findings import Finding
from packhorse.yaml_source.nodes import KeyPath

SMOOTHED = ("sigmoid", "robust")


def objective_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield the rules on `objective` that the recipe breaks."""
    objective = recipe.objective
    if isinstance(objective, DistilObjective):
        yield from _distil_rules(objective)
    if not isinstance(objective, PairedObjective):
        return
    yield from _method_rules(recipe, objective.kind)
    yield from _data_rules(recipe, objective.kind)
    yield from _step_rules(recipe, objective.kind)
    reference = getattr(objective, "reference", None)
    if isinstance(reference, ReferenceSection):
        yield from _reference_rules(reference)
    if isinstance(objective, DpoObjective) and objective.label_smoothing and objective.loss not in SMOOTHED:
        yield Finding(
            (("objective", "label_smoothing"), ("objective", "loss")),
            f"objective.label_smoothing is {objective.label_smoothing:g}, and objective.loss is {objective.loss}.",
            f"only {' and '.join(SMOOTHED)} read it.",
            "remove objective.label_smoothing, or set objective.loss to sigmoid",
        )
    if isinstance(objective, KtoObjective) and objective.desirable_weight == objective.undesirable_weight == 0:
        yield Finding(
            (("objective", "desirable_weight"), ("objective", "undesirable_weight")),
            "objective.desirable_weight and objective.undesirable_weight are 0.",
            "every loss would be 0.",
            "set one of them to 1",
        )


def _method_rules(recipe: Recipe, kind: str) -> Iterator[Finding]:
    method = recipe.method
    if isinstance(method, LoraMethod) and method.dropout > 0:
        yield _conflict(
            ("method", "dropout"),
            f"method.dropout is {method.dropout:g}",
            kind,
            "both answers must be scored by the same weights; the noise of dropout would be part of the margin.",
            "set method.dropout to 0",
        )
    if isinstance(method, PromptTuningMethod | PrefixTuningMethod):
        yield _conflict(
            ("method",),
            f"method is {method.kind}",
            kind,
            "its virtual tokens shift the positions at which the log-probabilities of an answer are summed.",
            "set method to lora or full",
        )


def _data_rules(recipe: Recipe, kind: str) -> Iterator[Finding]:
    data = recipe.data
    if data.over_long in ("truncate", "split"):
        yield _conflict(
            ("data", "over_long"),
            f"data.over_long is {data.over_long}",
            kind,
            "a part of an answer may be better or worse than the whole answer was.",
            "set data.over_long to drop, or to raise",
        )
    if data.train_on.roles != ["assistant"]:
        yield _conflict(
            ("data", "train_on", "roles"),
            f"data.train_on.roles is {data.train_on.roles}",
            kind,
            "it scores the assistant's answer; all turns before it are the prompt.",
            "remove data.train_on.roles",
        )
    if data.train_on.thinking == "mask":
        yield _conflict(
            ("data", "train_on", "thinking"),
            "data.train_on.thinking is mask",
            kind,
            "two answers with different thinking would have different prompts.",
            "set data.train_on.thinking to keep or remove",
        )


def _step_rules(recipe: Recipe, kind: str) -> Iterator[Finding]:
    if recipe.optimizer.in_backward:
        yield _conflict(
            ("optimizer", "in_backward"),
            "optimizer.in_backward is true",
            kind,
            "it is proven for losses of tokens only.",
            "set optimizer.in_backward to false",
        )
    if recipe.track.noise_scale:
        yield _conflict(
            ("track", "noise_scale"),
            "track.noise_scale is true",
            kind,
            "it compares gradients of different numbers of tokens, and this loss is a mean over rows.",
            "set track.noise_scale to false",
        )


def _distil_rules(section: DistilObjective) -> Iterator[Finding]:
    fix = "give objective.teacher.id (hub) or objective.teacher.path (a local folder or an earlier run)"
    yield from _named_model_rules("teacher", section.teacher, "the student learns from one model.", fix)
    if section.top != "all" and section.divergence != "forward":
        yield Finding(
            (("objective", "top"), ("objective", "divergence")),
            f"objective.divergence is {section.divergence}, and objective.top is {section.top}.",
            "it weighs tokens by the student's probabilities, and the stored tokens of the teacher lack most of these: "
            "the gradient would be biased.",
            "set objective.top: all, or objective.divergence: forward",
        )


def _reference_rules(reference: ReferenceSection) -> Iterator[Finding]:
    fix = "give objective.reference.id (hub) or objective.reference.path (a local folder), or set it to start"
    yield from _named_model_rules("reference", reference, "the reference is one model.", fix)


def _named_model_rules(field: str, model: ReferenceSection | TeacherModel, why: str, fix: str) -> Iterator[Finding]:
    """Yield what is wrong with a field of `objective` that names one model by hub id or path."""
    given = [name for name in ("id", "path") if getattr(model, name) is not None]
    if len(given) != 1:
        yield Finding(
            (("objective", field, "id"), ("objective", field, "path")),
            f"objective.{field} gives {' and '.join(given) or 'neither id nor path'}.",
            why,
            fix,
        )
    if model.revision is not None and model.id is None:
        yield Finding(
            (("objective", field, "revision"),),
            f"objective.{field}.revision is {model.revision}, but there is no objective.{field}.id.",
            "a revision is a commit of a model on the hub.",
            f"remove it, or name the model by objective.{field}.id",
        )


def _conflict(path: KeyPath, fact: str, kind: str, why: str, fix: str) -> Finding:
    return Finding((path, ("objective",)), f"{fact}, and objective is {kind}.", why, fix)
