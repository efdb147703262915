"""What is stored between forward and backward pass: everything, each n-th layer's input, or those in host memory."""

from __future__ import annotations

from typing import Any

from packhorse.recipe.schema import ParallelSection


def apply_checkpointing(model: Any, parallel: ParallelSection) -> None:  # noqa: ANN401
    """Recomputes layers in the backward pass as `parallel.checkpointing` says (Chen et al. 2016, arXiv 1604.06174).

    Of a recomputed layer only the input is stored, and with `parallel.offload_activations` in pinned host memory; the
    weights stay where they are.

    Args:
        model: A transformers model, before an adapter is put around it or after.
        parallel: The recipe's.
    """
    if parallel.checkpointing is False:
        return
    # `true` is each layer; in Python it is also the number 1.
    model.activation_checkpointing_enable(
        {"use_reentrant": False}, every_n_layers=int(parallel.checkpointing), offload=parallel.offload_activations
    )
