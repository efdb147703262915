"""Rules between the fields that say how weights are stepped: optimizer, schedule, length, precision, memory."""

from __future__ import annotations

from collections.abc import Iterator

from packhorse.recipe.findings import Finding
from packhorse.recipe.methods import LoraMethod
from packhorse.recipe.schema import OptimizerSection, Recipe
from packhorse.recipe.schema_view import KeyPath

# Optimizer -> largest sensible learning rate, why, and what to use.
_ADAMW_RATES = (
    0.1,
    "AdamW moves each weight by about the learning rate in a step, and weights are near 0.02: "
    "one step would wipe out the model.",
    "use 1e-5 to 2e-5 (full), 1e-4 to 2e-4 (lora, qlora), up to 5e-3 (small fresh models)",
)
_LION_RATES = (
    0.01,
    "Lion moves each weight by just the learning rate in a step, where AdamW mostly moves it by less.",
    "use a third to a tenth of AdamW's: 2e-6 to 5e-6 (full), 2e-5 to 5e-5 (lora, qlora)",
)
LEARNING_RATES = {
    "adafactor": (
        0.1,
        "Adafactor moves each matrix by about the learning rate times its own root mean square in a step.",
        "use 1e-3 to 1e-2",
    ),
    "lion": _LION_RATES,
    "lion_8bit": _LION_RATES,
    "muon": (
        0.1,
        "Muon's steps are scaled to the size of AdamW's: about the learning rate for each weight, and weights are "
        "near 0.02.",
        "use AdamW's: 1e-5 to 2e-5 (full), 1e-4 to 2e-4 (lora, qlora), up to 5e-3 (small fresh models)",
    ),
}
ADAMW_BETAS = (0.9, 0.999)

# Fields of the optimizer that some optimizers do not read.
READ_BY = {
    "betas": ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit", "muon"),
    "epsilon": ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"),
    "momentum": ("muon",),
}
WITHOUT_MATRICES = ("prompt_tuning", "prefix_tuning", "ia3")


def training_rules(recipe: Recipe) -> Iterator[Finding]:
    """How the recipe's weights are stepped, where it cannot be what was meant."""
    yield from _optimizer_rules(recipe.optimizer)
    yield from _ratio_rules(recipe)
    yield from _muon_rules(recipe)
    yield from _in_backward_rules(recipe)
    yield from _length_rules(recipe)
    yield from _decay_rules(recipe)
    yield from _precision_rules(recipe)
    yield from _memory_rules(recipe)


def _optimizer_rules(optimizer: OptimizerSection) -> Iterator[Finding]:
    name, rate = optimizer.name, optimizer.learning_rate
    largest, why, fix = LEARNING_RATES.get(name, _ADAMW_RATES)
    if rate > largest:
        fact = f"optimizer.learning_rate is {rate:g}, above {largest:g}."
        yield Finding((("optimizer", "learning_rate"),), fact, why, fix)
    for index, beta in enumerate(optimizer.betas):
        if beta >= 1:
            yield Finding(
                (("optimizer", "betas", index),),
                f"optimizer.betas.{index} is {beta:g}.",
                "at 1 the running mean never takes up a gradient, and its correction divides by 0.",
                "use [0.9, 0.99]" if name.startswith("lion") else "use [0.9, 0.999]",
            )
    if name.startswith("lion") and optimizer.betas == ADAMW_BETAS:
        yield Finding(
            (("optimizer", "betas"), ("optimizer", "name")),
            f"optimizer.name is {name}, and optimizer.betas is [0.9, 0.999], which is AdamW's.",
            "the second one is what Lion remembers gradients by: 0.99 in its paper (arXiv 2302.06675), where 0.999 "
            "would follow the gradients of a thousand steps ago.",
            "set optimizer.betas to [0.9, 0.99]",
        )
    for field, readers in READ_BY.items():
        value, default = getattr(optimizer, field), OptimizerSection.model_fields[field].default
        if name not in readers and value != default:
            yield Finding(
                (("optimizer", field), ("optimizer", "name")),
                f"optimizer.{field} is {_shown(value)}, and optimizer.name is {name}.",
                f"{name} does not read it.",
                f"remove optimizer.{field}, or choose another optimizer.name",
            )


def _shown(value: float | tuple[float, float]) -> str:
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}"


def _ratio_rules(recipe: Recipe) -> Iterator[Finding]:
    method, rate = recipe.method, recipe.optimizer.learning_rate
    if not isinstance(method, LoraMethod):
        return
    largest = LEARNING_RATES.get(recipe.optimizer.name, _ADAMW_RATES)[0]
    if rate <= largest < rate * method.learning_rate_ratio:
        yield Finding(
            (("method", "learning_rate_ratio"), ("optimizer", "learning_rate")),
            f"method.learning_rate_ratio {method.learning_rate_ratio:g} x optimizer.learning_rate {rate:g} is "
            f"{rate * method.learning_rate_ratio:g}, above {largest:g}.",
            "that is the learning rate of LoRA's B matrices.",
            f"set optimizer.learning_rate to {largest / method.learning_rate_ratio:.1g} or less",
        )


def _muon_rules(recipe: Recipe) -> Iterator[Finding]:
    if recipe.optimizer.name == "muon" and recipe.method.kind in WITHOUT_MATRICES:
        yield Finding(
            (("optimizer", "name"), ("method",)),
            f"optimizer.name is muon, and method is {recipe.method.kind}.",
            "Muon orthogonalises steps of weight matrices, and this method trains none.",
            "set optimizer.name to adamw",
        )


def _in_backward_rules(recipe: Recipe) -> Iterator[Finding]:
    optimizer = recipe.optimizer
    if not optimizer.in_backward:
        return
    if optimizer.clip_norm is not None:
        yield Finding(
            (("optimizer", "in_backward"), ("optimizer", "clip_norm")),
            f"optimizer.in_backward is true, and optimizer.clip_norm is {optimizer.clip_norm:g}.",
            "the global norm is known when the last gradient is, and the first weights have been stepped by then.",
            "set optimizer.clip_norm to null, or optimizer.in_backward to false",
        )
    if recipe.precision == "fp16":
        yield Finding(
            (("optimizer", "in_backward"), ("precision",)),
            "optimizer.in_backward is true, and precision is fp16.",
            "a step that overflows is left out as a whole, and the first weights would have been stepped by then.",
            "set precision to bf16, or optimizer.in_backward to false",
        )


def _length_rules(recipe: Recipe) -> Iterator[Finding]:
    steps, schedule = recipe.steps, recipe.schedule
    both: tuple[KeyPath, ...] = (("steps",), ("epochs",))
    if (steps is None) == (recipe.epochs is None):
        fact = (
            "neither steps nor epochs is given."
            if steps is None
            else f"steps is {steps} and epochs is {recipe.epochs}."
        )
        yield Finding(both, fact, "one of the two says how long to train.", "keep one of them, e.g. epochs: 1")
    if steps is not None and schedule.warmup_steps is not None and schedule.warmup_steps >= steps:
        yield Finding(
            (("schedule", "warmup_steps"), ("steps",)),
            f"schedule.warmup_steps is {schedule.warmup_steps}, of {steps} steps.",
            "the learning rate would never reach its peak.",
            f"set schedule.warmup_steps below {steps}, or use schedule.warmup_ratio: 0.03",
        )
    if schedule.warmup_steps is None and schedule.warmup_ratio >= 1:
        yield Finding(
            (("schedule", "warmup_ratio"),),
            "schedule.warmup_ratio is 1.",
            "the learning rate would only reach its peak after the last step.",
            "use 0.03 to 0.05",
        )


def _decay_rules(recipe: Recipe) -> Iterator[Finding]:
    steps, schedule = recipe.steps, recipe.schedule
    if schedule.name != "wsd":
        return
    if schedule.decay_ratio == 0:
        yield Finding(
            (("schedule", "decay_ratio"), ("schedule", "name")),
            "schedule.name is wsd, and schedule.decay_ratio is 0.",
            "without its decay, wsd is a constant learning rate.",
            "set schedule.decay_ratio to 0.1, or schedule.name to constant",
        )
    rise = schedule.warmup_ratio
    if schedule.warmup_steps is not None:
        rise = schedule.warmup_steps / steps if steps else 0.0
    # A warm-up of all steps is refused by itself.
    if rise < 1 and rise + schedule.decay_ratio > 1:
        field = "warmup_ratio" if schedule.warmup_steps is None else "warmup_steps"
        yield Finding(
            (("schedule", "decay_ratio"), ("schedule", field)),
            f"the warm-up takes {rise:g} of all steps and schedule.decay_ratio {schedule.decay_ratio:g}: "
            f"{rise + schedule.decay_ratio:g} together.",
            "the learning rate would go down before it is up.",
            f"set schedule.decay_ratio to {1 - rise:.3g} or less",
        )


def _precision_rules(recipe: Recipe) -> Iterator[Finding]:
    if recipe.tf32 and recipe.precision != "fp32":
        yield Finding(
            (("tf32",), ("precision",)),
            f"tf32 is true, and precision is {recipe.precision}.",
            f"TF32 is a way to multiply fp32 matrices; under {recipe.precision} they are multiplied in 16 bit.",
            "remove tf32, or set precision to fp32",
        )
    if recipe.precision == "fp16" and recipe.model.dtype == "bfloat16":
        yield Finding(
            (("precision",), ("model", "dtype")),
            "precision is fp16, but model.dtype is bfloat16.",
            "weights stored in bfloat16 have 8 bits of precision, of fp16's 11, and what is beyond fp16's range.",
            "set model.dtype to auto, or precision to bf16",
        )
    if recipe.precision == "fp16" and recipe.track.noise_scale:
        yield Finding(
            (("precision",), ("track", "noise_scale")),
            "precision is fp16, and track.noise_scale is true.",
            "a loss scale that changes, and steps that are left out, would be in the figure.",
            "set precision to bf16 or fp32, or track.noise_scale to false",
        )


def _memory_rules(recipe: Recipe) -> Iterator[Finding]:
    parallel = recipe.parallel
    if parallel.offload_activations and parallel.checkpointing is False:
        yield Finding(
            (("parallel", "offload_activations"), ("parallel", "checkpointing")),
            "parallel.offload_activations is true, and parallel.checkpointing is false.",
            "then every intermediate result and a copy of every weight in 16 bit would go to the host and back: "
            "slower than to recompute them. What checkpointing stores, the input of each layer, is worth the way.",
            "set parallel.checkpointing to true, or parallel.offload_activations to false",
        )
