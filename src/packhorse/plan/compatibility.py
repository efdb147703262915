"""Which method runs on which engine; a pair that does not is refused by name, with the nearest that does.

Each refusal was found by trying the pair, or by reading what the library does with it; docs/engines.md shows the table
that `pairs_table` makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, get_args

from packhorse.errors import UserError
from packhorse.plan.run_plan import Device, Topology
from packhorse.recipe.methods import LoraMethod, Method, QloraMethod
from packhorse.recipe.schema import Engine, Recipe

ENGINES: Final[tuple[Engine, ...]] = get_args(Engine)
BY_DTENSOR: Final = ("fsdp2", "hsdp")
SHARDING_WEIGHTS: Final = ("zero3", "zero3_offload", "zero3_nvme", *BY_DTENSOR)
NO_RESUME_FROM_NVME: Final = (
    "DeepSpeed does not bring back optimizer states that it keeps in files: a run that went on would train otherwise."
)


@dataclass(frozen=True)
class Refusal:
    """Methods that do not run on some engines.

    Attributes:
        methods: As `name_of` calls them.
        engines: Those that they do not run on.
        why: What would happen.
        instead: The nearest pairs that work, as fields of the recipe.
        only_on: The device that it is about; None for all.
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
        "bitsandbytes keeps 8-bit weights and their scales outside the parameter that the engine shards, so that every "
        "rank would hold them whole.",
        "method.quantization nf4, or parallel.engine zero2 or ddp",
    ),
    Refusal(
        ("qlora nf4 or fp4, dora",),
        ("zero3", "zero3_offload", "zero3_nvme"),
        "on a CPU peft puts another weight in the place of the one that DeepSpeed has partitioned.",
        "parallel.engine fsdp2 or zero2, or method.dora false",
        only_on="cpu",
    ),
    Refusal(
        ("qlora nf4 or fp4, loftq",),
        ENGINES,
        "peft computes LoftQ on a GPU only.",
        "method.initialization default, or run where there is a GPU",
        only_on="cpu",
    ),
)


def name_of(method: Method) -> str:
    """The row of the table that a method stands in."""
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
    """Why the pair does not run there; None if it does."""
    for one in REFUSALS:
        if method in one.methods and engine in one.engines and one.only_on in (None, device):
            return one
    return None


def check_pair(recipe: Recipe, topology: Topology) -> None:
    """Refuses what would fail half-way, or train otherwise than planned.

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
    if recipe.model.new_tokens and topology.engine.startswith("zero3") and not recipe.method.trains_base:
        raise UserError(
            f"model.new_tokens adds {len(recipe.model.new_tokens)} tokens, method is {name}, and parallel.engine is "
            f"{topology.engine}.",
            "peft reads the rows that are trained on rank 0 alone, where DeepSpeed has not shared them out yet.",
            "set parallel.engine to fsdp2 or zero2, or method to full.",
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
            "DeepSpeed keeps all weights in the 16-bit type that it computes with, and float32 masters of those that "
            "are trained.",
            "set model.dtype to auto, precision to fp32, or parallel.engine to ddp or fsdp2.",
        )


def _cell(method: str, engine: str) -> str:
    refusal = refusal_of(method, engine, "cpu")
    if refusal is None:
        return "yes"
    return f"{'GPU' if refusal.only_on == 'cpu' else 'no'} ({REFUSALS.index(refusal) + 1})"


def pairs_table(engines: Sequence[str] = ENGINES) -> str:
    """The table of docs/engines.md: methods down, engines across, and the reasons below it."""
    lines = ["| method | " + " | ".join(f"`{engine}`" for engine in engines) + " |", "|---" * (len(engines) + 1) + "|"]
    for method in METHODS:
        cells = [_cell(method, engine) for engine in engines]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines.append("")
    for number, one in enumerate(REFUSALS, 1):
        lines.append(f"{number}. {one.why[0].upper()}{one.why[1:]} Nearest: {one.instead}.")
    return "\n".join(lines) + "\n"
