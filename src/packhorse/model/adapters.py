"""Adapters through peft: which modules get one, what is trained, and proof that it is what was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from packhorse.errors import UserError
from packhorse.recipe.methods import LoraMethod, QloraMethod


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: all of them, and those that are trained."""

    total: int
    trainable: int


def add_lora(model: nn.Module, method: LoraMethod | QloraMethod) -> nn.Module:
    """Freezes the model and adds low-rank adapters (Hu et al. 2021, arXiv 2106.09685).

    Raises:
        UserError: `method.target` names no module of this model.
    """
    _refuse_output_head(model, method)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=method.target,
    )
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise UserError(
            f"method.target {method.target} names no module of this model.",
            "an adapter that is nowhere trains nothing.",
            f"set method.target to all-linear, or to some of {', '.join(names)}.",
        ) from error
    return adapted


def _refuse_output_head(model: Any, method: LoraMethod) -> None:  # noqa: ANN401
    head = model.get_output_embeddings()
    name = next((name for name, part in model.named_modules() if part is head), "lm_head").rsplit(".", 1)[-1]
    if isinstance(method.target, list) and name in method.target:
        raise UserError(
            f"method.target names {name}, the output head.",
            "the head computes the loss itself, in chunks, and an adapter beside it would be left out.",
            f"take {name} out of method.target, or use all-linear, which leaves it out too.",
        )


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts parameters; a 4-bit weight counts as the numbers it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = state.shape.numel() if state is not None else parameter.numel()
        # ZeRO-3 leaves an empty tensor on each rank and keeps the true size beside it.
        size = getattr(parameter, "ds_numel", size)
        total += size
        trainable += size if parameter.requires_grad else 0
    return ParameterCount(total, trainable)
