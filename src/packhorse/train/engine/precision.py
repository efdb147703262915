"""Number formats: which products round their inputs, and how fp16 keeps small gradients.

bf16 and fp16 are autocast over float32 weights under single, ddp, fsdp2 and hsdp; under ZeRO, DeepSpeed computes with
16-bit weights and steps float32 master weights.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.amp import GradScaler

from packhorse.errors import UserError

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_LOSS_SCALE = 1.0


def set_matmul_precision(tf32: bool) -> None:
    """Allow or forbid that fp32 products on NVIDIA GPUs round their inputs to TF32, whatever torch's default is.

    Sums of 16-bit products stay in fp32, too: by default torch lets cuBLAS add parts of them in 16 bits, which it does
    where few columns meet many rows, as in an adapter's products.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def use_deterministic_kernels(wanted: bool) -> None:
    """Let torch use only kernels that give the same bits each time; an operator that has none raises an error.

    By default FlashAttention's backward pass and `index_add_` on CUDA add with atomic operations, in any order.
    """
    torch.use_deterministic_algorithms(wanted)
    # Otherwise every new tensor would first be filled with NaN, which only shows reads of memory that was never set.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def scale_on_cpu(accelerator: Accelerator) -> None:
    """Give fp16 on the CPU the autocast and loss scale of a GPU; Accelerate would silently train in fp32 there."""
    accelerator.native_amp = True
    accelerator.scaler = GradScaler("cpu")


def refuse_small_loss_scale(scale: float) -> None:
    """End a run that only skips steps.

    Raises:
        UserError: Gradients overflow at a scale that is too small to help.
    """
    if scale < MIN_LOSS_SCALE:
        raise UserError(
            f"gradients overflow fp16 even at a loss scale of {scale:g}; the smallest is {MIN_LOSS_SCALE:g}.",
            "fp16 ends at 65,504: activations or gradients of this model are larger, and every step is skipped.",
            "set precision to bf16 or fp32, or lower optimizer.learning_rate.",
        )
