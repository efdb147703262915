"""What the compute capability of the GPUs allows: the attention kernel, and the precision.

The varlen kernel is torch's FlashAttention-2 (flash_api.cpp, mha_varlen_fwd): compute capability 8.0 or newer, 16 bit,
heads of at most 256. Their width must be a multiple of 8, to which narrower heads are padded.
"""

from __future__ import annotations

from itertools import groupby
from typing import Final

from packhorse.errors import UserError
from packhorse.model_spec.configuration import find_configuration, published, widest_head
from packhorse.model_spec.supported import refuse_dropout, text_part
from packhorse.plan.run_plan import Decision, Device
from packhorse.recipe.schema import Recipe

WIDEST_VARLEN_HEAD: Final = 256
AMPERE: Final = 8.0
"""Compute capability from which on GPUs have bf16 and FlashAttention-2."""

GENERATIONS: Final = (
    ("V100", 7.0),
    ("T4", 7.5),
    ("A100", 8.0),
    ("L40S, RTX 4090", 8.9),
    ("H100, H200", 9.0),
    ("B200, GB200", 10.0),
    ("RTX 5090", 12.0),
)
"""GPUs and their compute capability (developer.nvidia.com/cuda-gpus)."""
OTHER_WIDTHS: Final = (("deepseek_v3 (padded)", 192), ("any, wider heads", 512))


def choose_attention(recipe: Recipe, device: Device, capability: float | None) -> Decision:
    """Return the attention kernel of a run, with the reason.

    Args:
        recipe: Recipe of the run.
        device: Device of its processes.
        capability: Compute capability of the GPUs; None where it is not known, which counts as 8.0 or newer.

    Raises:
        UserError: The kernel of the recipe does not run on the device or with the model.
    """
    configuration = text_part(find_configuration(recipe) or {})
    width = widest_head(configuration) or 0
    obstacle = varlen_obstacle(device, recipe.precision, width, capability)
    kernel = recipe.model.attention
    if kernel == "varlen" and obstacle:
        raise UserError(
            f"model.attention is varlen, and {obstacle}.",
            f"torch's varlen kernel is FlashAttention-2: compute capability 8.0 (Ampere) or newer, 16-bit precision, "
            f"heads of at most {WIDEST_VARLEN_HEAD}.",
            "set model.attention to sdpa or auto.",
        )
    if kernel == "auto":
        kernel = "sdpa" if obstacle else "varlen"
        reason = f"SDPA per document, exact on any device: {obstacle}"
        if not obstacle:
            reason = "torch's varlen kernel separates documents on CUDA"
            reason += f"; compute capability {capability}, {recipe.precision}" if capability is not None else ""
    else:
        reason = "model.attention of the recipe"
    if kernel == "varlen":
        refuse_dropout(configuration.get("attention_dropout") or 0)
    return Decision(name="model.attention", value=kernel, reason=reason)


def varlen_obstacle(device: Device, precision: str, width: int, capability: float | None) -> str:
    """Return why the varlen kernel does not run; empty if it does.

    Args:
        device: Device of the processes.
        precision: Precision of the recipe.
        width: Width of the widest attention head; 0 where it is not known.
        capability: Compute capability of the GPUs; None where it is not known.
    """
    if device == "cpu":
        return "the run is on the CPU"
    if capability is not None and capability < AMPERE:
        return f"the GPU has compute capability {capability}"
    if precision == "fp32":
        return "precision is fp32"
    return f"the model's attention heads are {width} wide" if width > WIDEST_VARLEN_HEAD else ""


def refuse_precision(recipe: Recipe, capability: float | None) -> None:
    """Refuse bf16 on GPUs without bf16 units.

    Raises:
        UserError: The precision is bf16 and the GPUs are older than Ampere.
    """
    if recipe.precision == "bf16" and capability is not None and capability < AMPERE:
        raise UserError(
            f"precision is bf16, and the GPU has compute capability {capability}.",
            "GPUs before 8.0 (Ampere) have no bf16 units, and torch emulates them slowly.",
            "set precision=fp16, or fp32.",
        )


def kernels_table() -> str:
    """Return the table of docs/families.md: the kernel of each family of the shipped configurations on each GPU."""
    names = [name for name, _ in GENERATIONS]
    precisions = ["fp16" if capability < AMPERE else "bf16" for _, capability in GENERATIONS]
    pairs = sorted({(str(each["model_type"]), widest_head(each) or 0) for each in published().values()})
    families = [(family, [width for _, width in group]) for family, group in groupby(pairs, key=lambda pair: pair[0])]
    rows = [["family", "head width", *names, "CPU"], ["---"] * (len(names) + 3)]
    rows.append(["precision", "", *precisions, "fp32, bf16"])
    for family, widths in [*families, *((family, [width]) for family, width in OTHER_WIDTHS)]:
        kernels = [
            "sdpa" if varlen_obstacle("cuda", precision, max(widths), capability) else "varlen"
            for (_, capability), precision in zip(GENERATIONS, precisions, strict=True)
        ]
        rows.append([family, ", ".join(map(str, widths)), *kernels, "sdpa"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
