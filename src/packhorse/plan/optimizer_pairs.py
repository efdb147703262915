"""Which optimizer, precision and memory setting runs on which engine and device; what does not is refused by name.

Each refusal was found by trying the pair, or stands in the library's documentation.
"""

from __future__ import annotations

from collections.abc import Iterator

from packhorse.errors import UserError
from packhorse.plan.run_plan import BatchSplit, Topology
from packhorse.recipe.schema import Recipe

BITSANDBYTES = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit")
IN_8_BITS = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit")
OFFLOADING = ("zero3_offload", "zero3_nvme")
BY_DTENSOR = ("fsdp2", "hsdp")
IN_BACKWARD_ENGINES = ("single", *BY_DTENSOR)
NOISE_SCALE_ENGINES = ("single", "ddp")


def check_stepping(recipe: Recipe, topology: Topology, batch: BatchSplit, num_steps: int | None) -> None:
    """Refuses settings of the optimizer, precision and memory that the engine or the device cannot keep.

    Args:
        recipe: What to learn.
        topology: Where it runs.
        batch: How a step is shared.
        num_steps: Optimizer steps; None before the data is prepared.

    Raises:
        UserError: The first that is found, with the nearest pair that works.
    """
    for error in (
        *_optimizer_on_engine(recipe, topology),
        *_in_backward(recipe, topology, batch),
        *_precision(recipe, topology),
        *_memory(recipe, topology),
        *_noise_scale(recipe, topology, batch),
        *_warmup(recipe, num_steps),
    ):
        raise error


def _optimizer_on_engine(recipe: Recipe, topology: Topology) -> Iterator[UserError]:
    name, engine = recipe.optimizer.name, topology.engine
    pair = f"optimizer.name is {name}, and parallel.engine is {engine}."
    if engine.startswith("zero") and name in ("muon", "adafactor"):
        kept = "orthogonalises whole matrices" if name == "muon" else "keeps a figure a row and a column of each matrix"
        other = "ddp or fsdp2" if name == "muon" else "ddp"
        yield UserError(
            pair,
            f"ZeRO cuts the weights into flat pieces without rows and columns, and {name} {kept}.",
            f"set parallel.engine to {other}, or optimizer.name to adamw or adamw_8bit.",
        )
    if engine in BY_DTENSOR and name == "adafactor":
        yield UserError(
            pair,
            "torch's Adafactor changes norms of sharded tensors in place, which torch refuses for them.",
            "set parallel.engine to ddp, or optimizer.name to adamw.",
        )
    if engine in BY_DTENSOR and name in BITSANDBYTES:
        yield UserError(
            pair,
            "bitsandbytes steps plain tensors; for the sharded tensors of this engine it has no kernel.",
            f"set parallel.engine to zero2 or zero3, which shard what {name} keeps, or optimizer.name to adamw.",
        )
    if engine in OFFLOADING and name in BITSANDBYTES:
        yield UserError(
            pair,
            f"weights are stepped in host memory there, and {name} is made to save memory of a GPU.",
            "set optimizer.name to adamw, or parallel.engine to zero3.",
        )
    if topology.device == "cpu" and name.startswith("paged_"):
        yield UserError(
            f"optimizer.name is {name}, and the run is on the CPU.",
            "paged states move between GPU and host memory; on a CPU bitsandbytes does not page.",
            f"set optimizer.name to {name.removeprefix('paged_')}.",
        )


def _in_backward(recipe: Recipe, topology: Topology, batch: BatchSplit) -> Iterator[UserError]:
    if not recipe.optimizer.in_backward:
        return
    engine = topology.engine
    if engine not in IN_BACKWARD_ENGINES:
        why = (
            "DDP adds up the gradients of all processes bucket by bucket, after the weights would have been stepped."
            if engine == "ddp"
            else "ZeRO steps whole partitions of the weights at the end of the backward pass."
        )
        yield UserError(
            f"optimizer.in_backward is true, and parallel.engine is {engine}.",
            why,
            "set parallel.engine to single (one process) or fsdp2 (several), or optimizer.in_backward to false.",
        )
    if batch.accumulation_steps > 1:
        micro = batch.micro_packs * batch.accumulation_steps
        yield UserError(
            f"optimizer.in_backward is true, and a step has {batch.accumulation_steps} backward passes.",
            "weights would be stepped with the first one's gradient alone.",
            f"set batch.micro to {micro} (or batch.packs to {batch.packs_per_step // batch.accumulation_steps}), "
            "or optimizer.in_backward to false.",
        )


def _precision(recipe: Recipe, topology: Topology) -> Iterator[UserError]:
    if recipe.precision == "fp16" and topology.device == "cpu" and topology.engine.startswith("zero"):
        yield UserError(
            f"precision is fp16, and parallel.engine is {topology.engine} on the CPU.",
            "DeepSpeed has no fp16 on a CPU.",
            "set precision to bf16 or fp32.",
        )
    if recipe.tf32 and topology.device == "cpu":
        yield UserError(
            "tf32 is true, and the run is on the CPU.",
            "TF32 is a format of NVIDIA GPUs.",
            "set tf32 to false.",
        )


def _memory(recipe: Recipe, topology: Topology) -> Iterator[UserError]:
    if recipe.parallel.offload_activations and topology.device == "cpu":
        yield UserError(
            "parallel.offload_activations is true, and the run is on the CPU.",
            "what is stored for the backward pass is in host memory already.",
            "set parallel.offload_activations to false.",
        )


def _noise_scale(recipe: Recipe, topology: Topology, batch: BatchSplit) -> Iterator[UserError]:
    if not recipe.track.noise_scale:
        return
    if topology.engine not in NOISE_SCALE_ENGINES or topology.sequence > 1:
        asked = f"parallel.sequence is {topology.sequence}" if topology.sequence > 1 else ""
        yield UserError(
            f"track.noise_scale is true, and {asked or f'parallel.engine is {topology.engine}'}.",
            "it compares the gradient of a part of the step with the whole one's, and here no process ever holds one "
            "part's whole gradient.",
            "set track.noise_scale to false, or measure it in a short run with parallel.engine ddp.",
        )
    if batch.accumulation_steps == 1:
        share = batch.packs_per_step // topology.data_ranks
        nearest = share // min((n for n in range(2, share + 1) if share % n == 0), default=1)
        fix = f"set batch.micro to {nearest}" if share > 1 else f"set batch.packs to {2 * batch.packs_per_step}"
        yield UserError(
            "track.noise_scale is true, and a step is one backward pass.",
            "it compares the first pass's gradient with the whole step's: there must be two passes at least.",
            f"{fix}, or track.noise_scale to false.",
        )


def _warmup(recipe: Recipe, num_steps: int | None) -> Iterator[UserError]:
    """What the recipe's own rules see where it gives `steps`; with `epochs` only the plan knows how many they are."""
    schedule = recipe.schedule
    if num_steps is None or recipe.steps is not None or schedule.warmup_steps is None:
        return
    if schedule.warmup_steps >= num_steps:
        yield UserError(
            f"schedule.warmup_steps is {schedule.warmup_steps}, and {recipe.epochs} epochs are {num_steps} steps.",
            "the learning rate would never reach its peak.",
            f"set schedule.warmup_steps below {num_steps}, or use schedule.warmup_ratio: 0.03.",
        )
    elif schedule.name == "wsd" and schedule.warmup_steps + num_steps * schedule.decay_ratio > num_steps:
        yield UserError(
            f"schedule.warmup_steps is {schedule.warmup_steps} of {num_steps} steps, and schedule.decay_ratio is "
            f"{schedule.decay_ratio:g}.",
            "the learning rate would go down before it is up.",
            f"set schedule.decay_ratio to {1 - schedule.warmup_steps / num_steps:.2g} or less.",
        )
