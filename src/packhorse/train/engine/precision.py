"""Number formats: which products round their inputs, and how fp16 keeps small gradients.

bf16 and fp16 are autocast over float32 weights under single, ddp, fsdp2 and hsdp; under ZeRO, DeepSpeed computes with
16-bit weights beside float32 masters that it steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from accelerate import Accelerator
from torch.amp import GradScaler

from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_LOSS_SCALE = 1.0


def set_matmul_precision(tf32: bool) -> None:
    """Lets fp32 products of NVIDIA GPUs round their inputs to TF32, or forbids it, whatever the default is."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def mixed_precision(plan: RunPlan) -> Literal["no", "bf16", "fp16"]:
    """Accelerate's name for the recipe's precision."""
    precision = plan.recipe.precision
    return "no" if precision == "fp32" else precision


def scale_on_cpu(accelerator: Accelerator) -> None:
    """Gives fp16 on the CPU the autocast and the loss scale that Accelerate gives it on GPUs.

    By itself Accelerate would train in fp32 there, without a word.
    """
    accelerator.native_amp = True
    accelerator.scaler = GradScaler("cpu")


def refuse_small_loss_scale(scale: float) -> None:
    """Ends a run that only skips steps.

    Raises:
        UserError: Gradients overflow although nothing is gained by a scale any more.
    """
    if scale < SMALLEST_LOSS_SCALE:
        raise UserError(
            f"gradients overflow fp16 even at a loss scale of {scale:g}; the smallest is {SMALLEST_LOSS_SCALE:g}.",
            "fp16 ends at 65,504: activations or gradients of this model are larger, and every step is left out.",
            "set precision to bf16 or fp32, or lower optimizer.learning_rate.",
        )
