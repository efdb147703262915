"""Which methods, optimizers, precisions and memory settings run on which engine and device.

A pair that does not run is refused by name, with the nearest one that does. Each refusal was found by trying the pair,
or is documented by the library. docs/engines.md shows the table of `pairs_table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, get_args

from packhorse.errors import UserError
from packhorse.model_spec.configuration import find_configuration
from packhorse.model_spec.supported import text_part
from packhorse.plan.run_plan import BatchSplit, Device, Topology
from packhorse.recipe.methods import LoraMethod, Method, QloraMethod
from packhorse.recipe.rules.model import unshared_heads
from packhorse.recipe.schema import Engine, Recipe

ENGINES: Final[tuple[Engine, ...]] = get_args(Engine)
BY_DTENSOR: Final = ("fsdp2", "hsdp")
SHARDING_WEIGHTS: Final = ("zero3", "zero3_offload", "zero3_nvme", *BY_DTENSOR)
BITSANDBYTES: Final = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit")
IN_8_BITS: Final = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit")
OFFLOADING: Final = ("zero3_offload", "zero3_nvme")
IN_BACKWARD_ENGINES: Final = ("single", *BY_DTENSOR)
NOISE_SCALE_ENGINES: Final = ("single", "ddp")
NO_RESUME_FROM_NVME: Final = (
    "DeepSpeed does not restore optimizer states that it keeps in files, so a resumed run would train differently."
)


@dataclass(frozen=True)
class Refusal:
    """Methods that do not run on some engines.

    Attributes:
        methods: Names of the methods, as returned by `name_of`.
        engines: Engines that they do not run on.
        why: What would happen.
        instead: Nearest pairs that work, as fields of the recipe.
        only_on: Device on which the pair does not run; None for all devices.
    """

    methods: tuple[str, ...]
    engines: tuple[str, ...]
    why: str
    instead: str
    only_on: Device | None = None


METHODS: Final = (
    "full",
    "partial",
    "lora",
    "lora, dora",
    "lora, pissa or olora",
    "qlora nf4 or fp4",
    "qlora nf4 or fp4, dora",
    "qlora nf4 or fp4, loftq",
    "qlora int8",
    "ia3",
    "prompt_tuning",
    "prefix_tuning",
)

REFUSALS: Final[tuple[Refusal, ...]] = (
    Refusal(
        ("qlora int8",),
        SHARDING_WEIGHTS,
        "bitsandbytes keeps 8-bit weights and their scales outside the parameter that the engine shards, so every rank "
        "would hold them whole.",
        "method.quantization nf4, or parallel.engine zero2 or ddp",
    ),
    Refusal(
        ("qlora nf4 or fp4, dora",),
        ("zero3", "zero3_offload", "zero3_nvme"),
        "on a CPU peft replaces the weight that DeepSpeed has partitioned.",
        "parallel.engine fsdp2 or zero2, or method.dora false",
        only_on="cpu",
    ),
    Refusal(
        ("qlora nf4 or fp4, loftq",),
        ENGINES,
        "peft computes LoftQ on a GPU only.",
        "method.initialization default, or run on a GPU",
        only_on="cpu",
    ),
)


def name_of(method: Method) -> str:
    """Return the row of the table for a method."""
    if not isinstance(method, LoraMethod):
        return method.kind
    name: str = method.kind
    if isinstance(method, QloraMethod):
        name += " int8" if method.quantization == "int8" else " nf4 or fp4"
    if method.dora:
        name += ", dora"
    elif method.initialization in ("pissa", "olora"):
        name += ", pissa or olora"
    elif method.initialization == "loftq":
        name += ", loftq"
    return name


def refusal_of(method: str, engine: str, device: Device) -> Refusal | None:
    """Return why a method does not run on an engine and device; None if it does."""
    for refusal in REFUSALS:
        if method in refusal.methods and engine in refusal.engines and refusal.only_on in (None, device):
            return refusal
    return None


def check_pair(recipe: Recipe, topology: Topology) -> None:
    """Refuse pairs that would fail during training, or train differently than planned.

    Raises:
        UserError: The pair of method and engine, or of stored type and engine, does not run.
    """
    name = name_of(recipe.method)
    refusal = refusal_of(name, topology.engine, topology.device)
    if refusal is not None:
        where = " on a CPU" * (refusal.only_on == "cpu")
        raise UserError(
            f"method is {name}, and parallel.engine is {topology.engine}{where}.",
            refusal.why,
            f"set {refusal.instead}.",
        )
    if _stores_other_type(recipe, topology):
        raise UserError(
            f"model.dtype is {recipe.model.dtype}, precision is {recipe.precision}, method is {name}, and "
            f"parallel.engine is {topology.engine}.",
            "4-bit weights are stored in elements of model.dtype, which FSDP2 casts to the precision: their bits would "
            "become other numbers.",
            "set model.dtype to auto.",
        )
    if recipe.model.new_tokens and topology.engine.startswith("zero3") and not recipe.method.trains_base:
        raise UserError(
            f"model.new_tokens adds {len(recipe.model.new_tokens)} tokens, method is {name}, and parallel.engine is "
            f"{topology.engine}.",
            "peft reads the trained rows on rank 0 alone, before DeepSpeed distributes them to the other ranks.",
            "set parallel.engine to fsdp2 or zero2, or method to full.",
        )
    if recipe.objective.kind == "reward" and topology.engine in ("fsdp2", "hsdp") and not recipe.method.trains_base:
        raise UserError(
            f"objective is reward, method is {name}, and parallel.engine is {topology.engine}.",
            "saving a trained head of one row beside an adapter hangs there.",
            "set parallel.engine to ddp or zero2, or method to full.",
        )
    every = recipe.checkpoint.every_steps
    if topology.engine == "zero3_nvme" and every is not None:
        raise UserError(
            f"checkpoint.every_steps is {every}, and parallel.engine is zero3_nvme.",
            NO_RESUME_FROM_NVME,
            "remove checkpoint.every_steps, or set parallel.engine to zero3_offload.",
        )
    if topology.engine.startswith("zero") and recipe.model.dtype == "float32" and recipe.precision != "fp32":
        raise UserError(
            f"model.dtype is float32, precision is {recipe.precision}, and parallel.engine is {topology.engine}.",
            "DeepSpeed stores all weights in the 16-bit type of the computation, and float32 masters of the trained "
            "ones.",
            "set model.dtype to auto, precision to fp32, or parallel.engine to ddp or fsdp2.",
        )


def _stores_other_type(recipe: Recipe, topology: Topology) -> bool:
    """Return whether FSDP2 would cast the elements in which bitsandbytes packs 4-bit weights."""
    own = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[recipe.precision]
    packed = isinstance(recipe.method, QloraMethod) and recipe.method.quantization != "int8"
    return packed and topology.engine in BY_DTENSOR and recipe.model.dtype not in ("auto", own)


def check_heads(recipe: Recipe, topology: Topology) -> None:
    """Refuse groups that cannot share the attention heads equally; an unknown model is checked after loading.

    Raises:
        UserError: `parallel.sequence` does not divide the number of attention heads.
    """
    size = topology.sequence
    if size == 1:
        return
    heads = text_part(find_configuration(recipe) or {}).get("num_attention_heads")
    if heads is not None and heads % size:
        raise unshared_heads(size, heads, topology.world_size)


def check_training_settings(recipe: Recipe, topology: Topology, batch: BatchSplit, num_steps: int | None) -> None:
    """Refuse settings of optimizer, precision and memory that the engine or the device does not support.

    Args:
        recipe: Recipe of the run.
        topology: Placement of the processes.
        batch: Split of a step.
        num_steps: Optimizer steps; None before the data is prepared.

    Raises:
        UserError: A setting is not supported; the message names the nearest one that is.
    """
    for error in (
        *_optimizer_on_engine(recipe, topology),
        *_in_backward(recipe, topology, batch),
        *_precision(recipe, topology),
        *_memory(recipe, topology),
        *_noise_scale(recipe, topology, batch),
        *_warmup(recipe, num_steps),
        *_profile(recipe, num_steps),
    ):
        raise error


def _optimizer_on_engine(recipe: Recipe, topology: Topology) -> Iterator[UserError]:
    name, engine = recipe.optimizer.name, topology.engine
    pair = f"optimizer.name is {name}, and parallel.engine is {engine}."
    if engine.startswith("zero") and name in ("muon", "adafactor"):
        needs = "orthogonalises whole matrices" if name == "muon" else "keeps one number per row and column"
        other = "ddp or fsdp2" if name == "muon" else "ddp"
        yield UserError(
            pair,
            f"ZeRO cuts the weights into flat pieces without rows and columns, and {name} {needs}.",
            f"set parallel.engine to {other}, or optimizer.name to adamw or adamw_8bit.",
        )
    if engine in BY_DTENSOR and name == "adafactor":
        yield UserError(
            pair,
            "torch's Adafactor changes norms in place, which torch does not allow for sharded tensors.",
            "set parallel.engine to ddp, or optimizer.name to adamw.",
        )
    if engine in BY_DTENSOR and name in BITSANDBYTES:
        yield UserError(
            pair,
            "bitsandbytes has kernels for plain tensors, not for the sharded tensors of this engine.",
            f"set parallel.engine to zero2 or zero3, which shard the states of {name}, or optimizer.name to adamw.",
        )
    if engine in OFFLOADING and name in BITSANDBYTES:
        yield UserError(
            pair,
            f"this engine steps the weights in host memory, and {name} saves memory of a GPU.",
            "set optimizer.name to adamw, or parallel.engine to zero3.",
        )
    if topology.device == "cpu" and name.startswith("paged_"):
        yield UserError(
            f"optimizer.name is {name}, and the run is on the CPU.",
            "paged states move between GPU and host memory, and on a CPU bitsandbytes does not page.",
            f"set optimizer.name to {name.removeprefix('paged_')}.",
        )


def _in_backward(recipe: Recipe, topology: Topology, batch: BatchSplit) -> Iterator[UserError]:
    if not recipe.optimizer.in_backward:
        return
    engine = topology.engine
    if engine not in IN_BACKWARD_ENGINES:
        why = (
            "DDP sums the gradients of all processes in buckets, after the weights would have been stepped."
            if engine == "ddp"
            else "ZeRO steps whole partitions of the weights at the end of the backward pass."
        )
        yield UserError(
            f"optimizer.in_backward is true, and parallel.engine is {engine}.",
            why,
            "set parallel.engine to single (one process) or fsdp2 (several), or optimizer.in_backward to false.",
        )
    if batch.accumulation_steps > 1:
        yield UserError(
            f"optimizer.in_backward is true, and a step has {batch.accumulation_steps} backward passes.",
            "the weights would be stepped with the gradient of the first pass alone.",
            f"set batch.micro to {batch.packs_per_rank} (or batch.packs to {topology.data_ranks * batch.micro_packs}), "
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
    if recipe.parallel.checkpointing == "selective" and topology.engine.startswith("zero3"):
        yield UserError(
            f"parallel.checkpointing is selective, and parallel.engine is {topology.engine}.",
            "torch's selective checkpointing stops at DeepSpeed's gathering of weights, which recomputation repeats.",
            "set parallel.checkpointing to true, or parallel.engine to fsdp2.",
        )
    if recipe.parallel.offload_activations and topology.device == "cpu":
        yield UserError(
            "parallel.offload_activations is true, and the run is on the CPU.",
            "on a CPU the activations are already in host memory.",
            "set parallel.offload_activations to false.",
        )


def _noise_scale(recipe: Recipe, topology: Topology, batch: BatchSplit) -> Iterator[UserError]:
    if not recipe.track.noise_scale:
        return
    if topology.engine not in NOISE_SCALE_ENGINES or topology.sequence > 1:
        setting = f"parallel.engine is {topology.engine}"
        if topology.sequence > 1:
            setting = f"parallel.sequence is {topology.sequence}"
        yield UserError(
            f"track.noise_scale is true, and {setting}.",
            "it compares the gradient of a part of the step with that of the whole step, and here no process holds "
            "the full gradient of a part.",
            "set track.noise_scale to false, or measure it in a short run with parallel.engine ddp.",
        )
    if batch.accumulation_steps == 1:
        share = batch.packs_per_rank
        nearest = share // min((n for n in range(2, share + 1) if share % n == 0), default=1)
        fix = f"set batch.micro to {nearest}" if share > 1 else f"set batch.packs to {2 * batch.packs_per_step}"
        yield UserError(
            "track.noise_scale is true, and a step is one backward pass.",
            "it compares the gradient of the first pass with that of the whole step, so it needs at least two passes.",
            f"{fix}, or track.noise_scale to false.",
        )


def _warmup(recipe: Recipe, num_steps: int | None) -> Iterator[UserError]:
    """Check the warm-up of a recipe with `epochs`; the rules of the recipe check one with `steps`."""
    schedule = recipe.schedule
    if num_steps is None or recipe.steps is not None or schedule.warmup_steps is None:
        return
    if schedule.warmup_steps >= num_steps:
        yield UserError(
            f"schedule.warmup_steps is {schedule.warmup_steps}, and {recipe.epochs} epochs are {num_steps} steps.",
            "the learning rate would never reach its peak.",
            f"set schedule.warmup_steps to {num_steps - 1} or less, or remove it: schedule.warmup_ratio then applies."
            if num_steps > 1
            else "remove schedule.warmup_steps.",
        )
    elif schedule.name == "wsd" and schedule.warmup_steps + num_steps * schedule.decay_ratio > num_steps:
        yield UserError(
            f"schedule.warmup_steps is {schedule.warmup_steps} of {num_steps} steps, and schedule.decay_ratio is "
            f"{schedule.decay_ratio:g}.",
            "the learning rate would decay before the warm-up ends.",
            f"set schedule.decay_ratio to {1 - schedule.warmup_steps / num_steps:.2g} or less.",
        )


def _profile(recipe: Recipe, num_steps: int | None) -> Iterator[UserError]:
    if recipe.track.profile is None:
        return
    first, last = recipe.track.profile.steps
    if first > last:
        yield UserError(
            f"track.profile.steps is [{first}, {last}].",
            "the profiler records from the first of the two steps to the second.",
            f"set track.profile.steps to [{last}, {first}].",
        )
    if num_steps is not None and last > num_steps:
        yield UserError(
            f"track.profile.steps is [{first}, {last}], and the run has {num_steps} steps.",
            "the profiler would record nothing of the steps that are missing.",
            f"set track.profile.steps to [{max(1, num_steps - last + first)}, {num_steps}].",
        )


def _cell(method: str, engine: str) -> str:
    refusal = refusal_of(method, engine, "cpu")
    if refusal is None:
        return "yes"
    return f"{'GPU' if refusal.only_on == 'cpu' else 'no'} ({REFUSALS.index(refusal) + 1})"


def pairs_table(engines: Sequence[str] = ENGINES) -> str:
    """Return the table of docs/engines.md: one row per method, one column per engine, and the reasons below."""
    lines = ["| method | " + " | ".join(f"`{engine}`" for engine in engines) + " |", "|---" * (len(engines) + 1) + "|"]
    for method in METHODS:
        cells = [_cell(method, engine) for engine in engines]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines.append("")
    for number, refusal in enumerate(REFUSALS, 1):
        lines.append(f"{number}. {refusal.why[0].upper()}{refusal.why[1:]} Instead: {refusal.instead}.")
    return "\n".join(lines) + "\n"
