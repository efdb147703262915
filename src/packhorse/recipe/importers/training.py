"""Maths of a step, length of training, intervals and names of another trainer's file."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from packhorse.recipe.importers.draft import Draft, node_of, trainers
from packhorse.yaml_source.nodes import Node, parse_scalar, plain

EVERY = {"evaluation.every_steps": "eval", "checkpoint.every_steps": "save", "track.every_steps": "logging"}


def translate_training(draft: Draft) -> None:
    """Translate batch, optimizer, schedule, precision, intervals and names."""
    _batch(draft)
    _optimizer(draft)
    _schedule(draft)
    _length_of_training(draft)
    _precision(draft)
    _every_steps(draft)
    _best(draft)
    _names(draft)


def _batch(draft: Draft) -> None:
    defaults = trainers()[draft.trainer]["batch"]
    micro = draft.take("per_device_train_batch_size", "micro_batch_size", "per_gpu_train_batch_size")
    accumulation, total = draft.take("gradient_accumulation_steps"), draft.take("batch_size", "train_batch_size")
    counts = [node.value if node else default for node, default in zip((micro, accumulation), defaults)]
    packing, unit = _packing(draft)
    if total is not None and accumulation is None:
        draft.set("batch.packs", total, note=f"the {unit} of one step over all GPUs")
    elif all(type(count) is int for count in counts):
        packs = counts[0] * counts[1] * draft.num_gpus
        draft.set("batch.packs", packs, micro or accumulation)
        draft.note(
            "batch.packs",
            f"{counts[0]} per GPU x {counts[1]} gradient accumulation x {draft.num_gpus} "
            f"GPU{'s' * (draft.num_gpus > 1)} = {packs} {unit} in one step. "
            "batch.packs counts all GPUs together; --gpus N imports the file for N GPUs",
        )
    else:
        for name, node in (("micro batch", micro), ("gradient_accumulation_steps", accumulation)):
            if node is not None:
                draft.omit(name, node, "the batch of a step is a whole number: set batch.packs")
    length = draft.take_field("batch.length")
    if length is not None:
        draft.set("batch.length", length)
        if draft.trainer == "torchtune" and "batch.length" not in draft.typed:
            draft.notes["batch.length"] = ["the file sets no limit: set it to the tokens of your longest row"]
    over_long = trainers()[draft.trainer]["over_long"]
    given = draft.take("excess_length_strategy")
    if given is not None and given.value in ("drop", "truncate", "raise"):
        over_long = given.value
    if over_long == "truncate" and "objective.kind" in draft.values:
        over_long = "drop"  # half an answer may be worse than the whole
    draft.set("data.over_long", over_long, given)
    if over_long != "raise":
        draft.note("data.over_long", f"{over_long} is what {draft.title} does; raise stops and names the rows")
    if packing == "none":
        draft.note(
            "data.packing", "one row per pack, as in the file; mixed fills the packs, which is faster and needs fewer"
        )
    draft.set("data.packing", packing)


def _packing(draft: Draft) -> tuple[str, str]:
    """Return the packing, and what a step counts."""
    on = [draft.take(name) for name in ("packing", "sample_packing", "neat_packing", "packed")]
    for name in ("eval_packing", "eval_sample_packing", "pad_to_sequence_len"):
        if (node := draft.take(name)) and node.value is not None:
            draft.omit(name, node, "all packs have batch.length tokens; evaluation packs rows as training does")
    strategy = draft.take("packing_strategy")
    if not any(node and node.value is True for node in on):
        return "none", "rows"
    best_fit = draft.trainer == "trl" and (strategy is None or str(strategy.value) != "wrapped")
    draft.note("data.packing", "documents in a pack never see each other")
    return ("best_fit" if best_fit else "mixed"), "packs"


def _optimizer(draft: Draft) -> None:
    rate = draft.take_field("optimizer.learning_rate")
    if rate is not None and isinstance(rate.value, str):  # quoted in the file: '2e-5'
        rate = node_of(parse_scalar(rate.value), rate)
    if rate is not None:
        draft.set("optimizer.learning_rate", rate)
    if (decay := draft.take_field("optimizer.weight_decay")) is not None:
        draft.set("optimizer.weight_decay", decay)
    betas = draft.take("adam_beta1"), draft.take("adam_beta2")
    if any(betas):
        numbers = [node.value if node else default for node, default in zip(betas, (0.9, 0.999))]
        draft.set("optimizer.betas", numbers, betas[0] or betas[1])
    if (clip := draft.take_field("optimizer.clip_norm")) is not None:
        draft.set("optimizer.clip_norm", clip.value or None, clip)
    if (name := draft.take_field("optimizer.name")) is not None:
        draft.set_from("optimizer.name", name, "optimizer")


def _schedule(draft: Draft) -> None:
    node = draft.take_field("schedule.name")
    name = str(node.value) if node else "cosine"
    if found := re.search(r"get_(\w+?)_schedule", name):  # torchtune
        name = found[1]
    if node is not None:
        draft.set_from("schedule.name", Node(name, node.file, node.line, name), "lr_scheduler")
    steps, ratio = draft.take_field("schedule.warmup_steps"), draft.take_field("schedule.warmup_ratio")
    rise = steps.value if steps else 0
    if name == "constant":
        draft.set("schedule.warmup_ratio", 0.0, steps or ratio, "the constant schedule has no warm-up")
    elif type(rise) is int and rise > 0:
        draft.set("schedule.warmup_steps", steps)
        draft.notes.pop("schedule.warmup_ratio", None)
    elif type(rise) is float and rise < 1:
        draft.set("schedule.warmup_ratio", steps)
    elif ratio is not None:
        draft.set("schedule.warmup_ratio", ratio)
    elif steps is not None:
        draft.set("schedule.warmup_ratio", 0.0, steps)
    arguments = draft.take("lr_scheduler_kwargs")
    given: Any = plain(arguments) if arguments else {}
    if isinstance(given, dict) and "min_lr_rate" in given:
        draft.set("schedule.final_ratio", given["min_lr_rate"], arguments)
    elif arguments is not None:
        draft.omit("lr_scheduler_kwargs", arguments, "see schedule.final_ratio and schedule.decay_ratio")
    if (final := draft.take_field("schedule.final_ratio")) is not None:
        draft.set("schedule.final_ratio", final)


def _length_of_training(draft: Draft) -> None:
    per_epoch = draft.take("max_steps_per_epoch")
    steps, epochs = draft.take_field("steps"), draft.take_field("epochs")
    num_epochs = epochs.value if epochs else 1
    if steps is not None and type(steps.value) is int and steps.value > 0:
        draft.set("steps", steps)
    elif per_epoch is not None and type(per_epoch.value) is int and type(num_epochs) is int:
        note = f"{per_epoch.value} steps in each of {num_epochs} epochs"
        draft.set("steps", per_epoch.value * num_epochs, per_epoch, note)
    elif type(num_epochs) in (int, float) and num_epochs > 0:
        whole = math.ceil(num_epochs)
        draft.set("epochs", whole, epochs)
        if whole != num_epochs:
            draft.note("epochs", f"{num_epochs} in the file; a recipe counts whole epochs, or steps")
    elif epochs is not None:
        draft.set("epochs", epochs)
    if "steps" in draft.values:
        draft.notes.pop("epochs", None)


def _precision(draft: Draft) -> None:
    found = {name: draft.take(name) for name in ("bf16", "fp16", "fp32", "pure_bf16")}
    dtype = draft.take("dtype", "mixed_precision")
    tf32 = draft.take("tf32")
    on = [name for name, node in found.items() if node and node.value not in (False, "false", "no")]
    if dtype is not None:
        draft.set_from("precision", dtype, "dtype")
    elif on:
        draft.set("precision", on[0].removeprefix("pure_"), found[on[0]])
    elif found["bf16"] and draft.trainer != "llamafactory":
        draft.set("precision", "fp32", found["bf16"], "the file turns bf16 off, and fp16 is not on")
    elif (default := draft.take_field("precision")) is not None:
        draft.set("precision", default)
    if tf32 is not None and tf32.value is True:
        if "precision" in draft.values and draft.values["precision"].value == "fp32":
            draft.set("tf32", tf32)
        else:
            draft.omit("tf32", tf32, "it applies to products of fp32 matrices, and precision has 16 bits")


def _every_steps(draft: Draft) -> None:
    for path, prefix in EVERY.items():
        strategy = draft.take(f"{prefix}_strategy", f"{prefix}uation_strategy")
        count = draft.take_field(path)
        if strategy is not None and strategy.value == "epoch":
            draft.omit(f"{prefix}_strategy", strategy, f"{path} counts steps")
        elif count is not None and strategy is not None and strategy.value in (False, "no"):
            draft.omit(f"{prefix}_steps", count, f"{prefix}_strategy is no")
        elif count is not None and type(count.value) is int and count.value > 0:
            draft.set(path, count)
        elif count is not None:
            draft.omit(f"{prefix}_steps", count, f"{path} is a whole number of steps")
    draft.take("do_eval")


def _best(draft: Draft) -> None:
    """Translate early stopping and the choice of the best checkpoint, where the recipe measures a validation loss."""
    every, saves, train = map(
        draft.values.get, ("evaluation.every_steps", "checkpoint.every_steps", "data.split.train")
    )
    is_measured = every is not None and not (train is not None and train.value == 1)
    stopping = {name: draft.take_field(f"evaluation.early_stopping.{name}") for name in ("patience", "min_delta")}
    for name, node in stopping.items():
        if node is not None and is_measured and stopping["patience"] is not None:
            draft.set(f"evaluation.early_stopping.{name}", node)
        elif node is not None:
            typed = draft.typed[f"evaluation.early_stopping.{name}"]
            draft.omit(typed, node, "it needs a patience, validation rows and evaluation.every_steps")
    best = draft.take("load_best_model_at_end")
    if best is not None and best.value is True:
        if is_measured and every is not None and saves is not None and every.value % saves.value == 0:
            draft.set("checkpoint.publish", "best", best)
        else:
            why = "checkpoint.publish: best needs validation rows and a checkpoint at each evaluated step"
            draft.omit("load_best_model_at_end", best, why)


def _names(draft: Draft) -> None:
    report, output, name = draft.take("report_to"), draft.take("output_dir"), draft.take_field("name")
    if report is not None:
        words = str(plain(report)).lower()
        if "wandb" not in words and "all" not in words:
            draft.set("track.wandb", "off", report)
        if "tensorboard" in words:
            draft.set("track.tensorboard", True, report)
    folder = Path(str(output.value)) if output else Path(draft.file).with_suffix("")
    text = str(name.value) if name else folder.name
    draft.set("name", re.sub("[^A-Za-z0-9._-]+", "-", text).strip("._-")[:100] or "my-run", name or output)
    if output is not None and str(folder.parent) != ".":
        draft.set(
            "runs_folder", str(folder.parent), output, f"the run folder is runs_folder/name; {folder} in the file"
        )
