"""Rules on training: batch, optimizer, schedule, precision and recovery; and all rules together."""

from __future__ import annotations

import math
from collections.abc import Iterator

from packhorse.recipe.methods import LoraMethod
from packhorse.recipe.rules.data import data_rules, name_rules
from packhorse.recipe.rules.evaluation import evaluation_rules
from packhorse.recipe.rules.model import model_rules, parallel_rules
from packhorse.recipe.rules.objective import objective_rules
from packhorse.recipe.rules.sweep import sweep_rules
from packhorse.recipe.rules.validation_loss import validation_loss_rules
from packhorse.recipe.schema import BatchSection, OptimizerSection, Recipe
from packhorse.yaml_source.findings import Finding
from packhorse.yaml_source.nodes import KeyPath
from packhorse.yaml_source.schema import join_words

# Largest sensible learning rate, the reason, and what to use.
_ADAMW_RATES = (
    0.1,
    "AdamW moves each weight by about the learning rate in a step, and weights are near 0.02: "
    "one step would destroy the model.",
    "use 1e-5 to 2e-5 (full), 1e-4 to 2e-4 (lora, qlora), up to 5e-3 (small fresh models)",
)
_LION_RATES = (
    0.01,
    "Lion moves each weight by exactly the learning rate in a step; AdamW mostly moves it by less.",
    "use a third to a tenth of AdamW's: 2e-6 to 5e-6 (full), 2e-5 to 5e-5 (lora, qlora)",
)
LEARNING_RATES = {
    "adafactor": (
        0.1,
        "Adafactor moves each matrix by about the learning rate times the matrix's root mean square in a step.",
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

# Optimizers that read each of these fields.
READ_BY = {
    "betas": ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit", "muon"),
    "epsilon": ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"),
    "momentum": ("muon",),
}
WITHOUT_MATRICES = ("prompt_tuning", "prefix_tuning", "ia3")


def rule_findings(recipe: Recipe) -> list[Finding]:
    """Return every rule that the recipe breaks."""
    return [
        *name_rules(recipe),
        *model_rules(recipe),
        *data_rules(recipe),
        *_batch_rules(recipe.batch),
        *parallel_rules(recipe.parallel),
        *training_rules(recipe),
        *recovery_rules(recipe),
        *sweep_rules(recipe),
        *evaluation_rules(recipe.evaluation),
        *validation_loss_rules(recipe),
        *objective_rules(recipe),
    ]


def training_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield the rules on optimizer, schedule, length, precision and memory that the recipe breaks."""
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
                "at 1 the running mean ignores every gradient, and its bias correction divides by 0.",
                "use [0.9, 0.99]" if name.startswith("lion") else "use [0.9, 0.999]",
            )
    if name.startswith("lion") and optimizer.betas == ADAMW_BETAS:
        yield Finding(
            (("optimizer", "betas"), ("optimizer", "name")),
            f"optimizer.name is {name}, and optimizer.betas is [0.9, 0.999], which is AdamW's.",
            "the second value is the decay of Lion's momentum: 0.99 in its paper (arXiv 2302.06675); with 0.999 it "
            "would follow gradients of a thousand steps ago.",
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
            "Muon orthogonalises steps of weight matrices, and this method trains no matrix.",
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
            "the global norm is known with the last gradient, and the first weights are already stepped by then.",
            "set optimizer.clip_norm to null, or optimizer.in_backward to false",
        )
    if recipe.precision == "fp16":
        yield Finding(
            (("optimizer", "in_backward"), ("precision",)),
            "optimizer.in_backward is true, and precision is fp16.",
            "a step that overflows is skipped as a whole, and the first weights are already stepped by then.",
            "set precision to bf16, or optimizer.in_backward to false",
        )


def _length_rules(recipe: Recipe) -> Iterator[Finding]:
    steps, schedule = recipe.steps, recipe.schedule
    if (steps is None) == (recipe.epochs is None):
        fact = (
            "neither steps nor epochs is given."
            if steps is None
            else f"steps is {steps} and epochs is {recipe.epochs}."
        )
        paths: tuple[KeyPath, ...] = (("steps",), ("epochs",))
        why = "exactly one of the two sets the length of training."
        yield Finding(paths, fact, why, "give one of them, e.g. epochs: 1")
    if steps is not None and schedule.warmup_steps is not None and schedule.warmup_steps >= steps:
        yield Finding(
            (("schedule", "warmup_steps"), ("steps",)),
            f"schedule.warmup_steps is {schedule.warmup_steps}, of {steps} steps.",
            "the learning rate would never reach its peak.",
            f"set schedule.warmup_steps to {steps - 1} or less, or remove it: schedule.warmup_ratio then applies"
            if steps > 1
            else "remove schedule.warmup_steps",
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
            "without the decay, wsd is a constant learning rate.",
            "set schedule.decay_ratio to 0.1, or schedule.name to constant",
        )
    rise = schedule.warmup_ratio
    if schedule.warmup_steps is not None:
        rise = schedule.warmup_steps / steps if steps else 0.0
    # Another rule refuses a warm-up of all steps.
    if rise < 1 and rise + schedule.decay_ratio > 1:
        field = "warmup_ratio" if schedule.warmup_steps is None else "warmup_steps"
        yield Finding(
            (("schedule", "decay_ratio"), ("schedule", field)),
            f"the warm-up takes {rise:g} of all steps and schedule.decay_ratio {schedule.decay_ratio:g}: "
            f"{rise + schedule.decay_ratio:g} together.",
            "the learning rate would decay before the warm-up ends.",
            f"set schedule.decay_ratio to {1 - rise:.3g} or less",
        )


def _precision_rules(recipe: Recipe) -> Iterator[Finding]:
    if recipe.tf32 and recipe.precision != "fp32":
        yield Finding(
            (("tf32",), ("precision",)),
            f"tf32 is true, and precision is {recipe.precision}.",
            f"TF32 applies to products of fp32 matrices; under {recipe.precision} they are computed in 16 bits.",
            "remove tf32, or set precision to fp32",
        )
    if recipe.precision == "fp16" and recipe.model.dtype == "bfloat16":
        yield Finding(
            (("precision",), ("model", "dtype")),
            "precision is fp16, but model.dtype is bfloat16.",
            "weights stored in bfloat16 have 8 bits of precision, fewer than fp16's 11, and can exceed fp16's range.",
            "set model.dtype to auto, or precision to bf16",
        )
    if recipe.precision == "fp16" and recipe.track.noise_scale:
        yield Finding(
            (("precision",), ("track", "noise_scale")),
            "precision is fp16, and track.noise_scale is true.",
            "changes of the loss scale and skipped steps would distort the measurement.",
            "set precision to bf16 or fp32, or track.noise_scale to false",
        )


def _memory_rules(recipe: Recipe) -> Iterator[Finding]:
    parallel = recipe.parallel
    if parallel.offload_activations and parallel.checkpointing is False:
        yield Finding(
            (("parallel", "offload_activations"), ("parallel", "checkpointing")),
            "parallel.offload_activations is true, and parallel.checkpointing is false.",
            "without checkpointing every intermediate result and a 16-bit copy of every weight would move to the host "
            "and back, which is slower than recomputing them; with it, only the input of each layer moves.",
            "set parallel.checkpointing to true, or parallel.offload_activations to false",
        )


def _batch_rules(batch: BatchSection) -> Iterator[Finding]:
    # Null packs complete the shares of processes that do not divide the packs.
    shares = {math.ceil(batch.packs / processes) for processes in range(1, batch.packs + 1)}
    if isinstance(batch.micro, int) and all(share % batch.micro for share in shares):
        divisors = [number for number in range(1, batch.packs + 1) if batch.packs % number == 0]
        below = max(number for number in divisors if number <= batch.micro or number == 1)
        above = min((number for number in divisors if number > batch.micro), default=batch.packs)
        yield Finding(
            (("batch", "micro"), ("batch", "packs")),
            f"batch.micro is {batch.micro}, which does not divide batch.packs {batch.packs}.",
            "a step consists of forward passes of equal size, on any number of processes.",
            f"set batch.micro to {join_words([str(n) for n in sorted({below, above})])}",
        )


def recovery_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield steps that cannot be skipped, and rewinds without a checkpoint to return to."""
    recovery = recipe.recovery
    if recovery.on_nonfinite == "skip" and recipe.optimizer.in_backward:
        yield Finding(
            (("recovery", "on_nonfinite"), ("optimizer", "in_backward")),
            "recovery.on_nonfinite is skip, and optimizer.in_backward is true.",
            "the first weights are stepped before a NaN or Inf in the gradient can be detected.",
            "set recovery.on_nonfinite to stop, or optimizer.in_backward to false",
        )
    if recovery.on_spike == "rewind":
        yield from _rewind_rules(recipe)


def _rewind_rules(recipe: Recipe) -> Iterator[Finding]:
    recovery, checkpoint = recipe.recovery, recipe.checkpoint
    back, every = recovery.rewind_steps, checkpoint.every_steps
    if every is None:
        yield Finding(
            (("recovery", "on_spike"), ("checkpoint", "every_steps")),
            "recovery.on_spike is rewind, and checkpoint.every_steps is not given.",
            "each rewind would start again at step 0.",
            "set checkpoint.every_steps to 100, or recovery.on_spike to warn",
        )
    elif (checkpoint.keep_last - 1) * every < back - 1:
        yield Finding(
            (("recovery", "rewind_steps"), ("checkpoint", "keep_last"), ("checkpoint", "every_steps")),
            f"recovery.rewind_steps is {back}, and of the checkpoints every {every} steps the last "
            f"{checkpoint.keep_last} are kept.",
            "all of them can be newer than the step to return to, and the rewind would start again at step 0.",
            f"set checkpoint.keep_last to {1 - (1 - back) // every} or more, or checkpoint.every_steps higher",
        )
    if recovery.most_skipped < back:
        yield Finding(
            (("recovery", "most_skipped"), ("recovery", "rewind_steps")),
            f"recovery.rewind_steps is {back}, and recovery.most_skipped is {recovery.most_skipped}.",
            "the first rewind would skip more steps than allowed and end the run.",
            f"set recovery.most_skipped to {back} or more",
        )
