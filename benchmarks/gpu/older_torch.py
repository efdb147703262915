"""Completes a torch that is older than Packhorse needs, so that a machine whose torch cannot be replaced is measured.

`--libraries FOLDER` may hold torch's own files of torch.nn.modules.linear_cross_entropy (two, pure Python), which
docs/gpu.md shows how to copy from a newer torch. Everything else that is missing shows in the parts that need it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import LinearCrossEntropyOptions

PACKAGE = "torch.nn.modules"
FILES = ("linear_cross_entropy_options", "linear_cross_entropy")


def complete(folder: Path) -> None:
    """Add `LinearCrossEntropyOptions` and `linear_cross_entropy` to torch where it lacks them."""
    if not all((folder / f"{name}.py").is_file() for name in FILES):
        return
    import torch
    import torch.nn.functional as F

    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return
    options, operators = (_module(f"{PACKAGE}.{name}", folder / f"{name}.py") for name in FILES)
    torch.nn.LinearCrossEntropyOptions = options.LinearCrossEntropyOptions
    F.linear_cross_entropy = _function(operators)  # type: ignore[assignment]


def _module(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _function(operators: ModuleType) -> Callable[..., Tensor]:
    """Return the chunked path of torch 2.13's `F.linear_cross_entropy`: the only one that Packhorse takes."""
    import torch

    def linear_cross_entropy(
        input: Tensor,  # noqa: A002
        linear_weight: Tensor,
        target: Tensor,
        *,
        options: LinearCrossEntropyOptions,
        linear_bias: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        exact = options._adjust(
            num_batches=input.shape[0],
            in_features=input.shape[1],
            num_classes=linear_weight.shape[0],
            dtype=input.dtype,
            device=input.device,
        )
        policy = (exact.batch_chunk_size, exact.acc_policy, exact.acc_dtype)
        tensors = (input, linear_weight, target, linear_bias, None)
        if reduction == "none":
            return operators._linear_cross_entropy_batch_chunked_no_reduction(*tensors, -100, *policy)
        wanted = [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors[:4]]
        needed = (exact.allow_retain_graph, wanted[0], wanted[1], wanted[3])
        return operators._linear_cross_entropy_batch_chunked(*tensors, reduction, -100, 0.0, *policy, *needed)[0]

    return linear_cross_entropy
