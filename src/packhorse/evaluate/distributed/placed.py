"""Base and tuned model as an engine holds them for an evaluation: whole on each rank, or sharded layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from packhorse.evaluate.models import BASE, TUNED
from packhorse.model.methods.adapter_files import load_adapter
from packhorse.model.methods.attach import attach
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.methods import FullMethod, LoraMethod, Method
from packhorse.run_folder.layout import ADAPTER_FOLDER, MODEL_FOLDER
from packhorse.train.setup import base_request, from_folder, method_start, placed_model


def evaluated_model(
    run: RunPlan,
    launched: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    device: torch.device,
    name: str,
) -> nn.Module:
    """Return a model of a run in eval mode; of an adapter the tuned model, whose adapter can be disabled.

    Args:
        run: Plan of the run.
        launched: Plan of the processes that measure.
        tokenizer: Tokenizer of the run.
        num_tokens: Number of tokens of the tokenizer that writes the prompts.
        device: Device of this rank.
        name: `base`, `tuned` or a folder with a model.

    Raises:
        UserError: The model cannot be loaded.
    """
    # Rows are padded and need a mask, which sdpa supports; the attention of training needs packs.
    request = base_request(run, device, tokenizer, attention="sdpa")
    method = run.recipe.method
    is_adapted = name == TUNED and not method.trains_base
    if name not in (BASE, TUNED):
        request = replace(from_folder(request, Path(name)), quantization=None)
    elif name == TUNED and method.trains_base:
        request = from_folder(request, Path(run.run_folder) / MODEL_FOLDER)
    method = result_method(method) if is_adapted else FullMethod()
    start = method_start(run, tokenizer, resumed=True)

    def attached(base: PreTrainedModel) -> nn.Module:
        model: Any = attach(base, method, start)
        if is_adapted and model.active_peft_config.is_prompt_learning:
            import_module("packhorse.model.methods.prompts").answer_with_prompt(model)
        return model  # type: ignore[no-any-return]

    model = placed_model(launched, request, method, num_tokens, attached)
    if is_adapted:
        load_adapter(model, Path(run.run_folder) / ADAPTER_FOLDER)
    return model.eval()


def result_method(method: Method) -> Method:
    """Return the method whose adapter has the form of the run's result.

    PiSSA and OLoRA change the base when training starts; their result is an adapter of twice the rank, at the same
    scale, for the unchanged base (`adapter_files.adapter_writer`).
    """
    if not isinstance(method, LoraMethod) or method.initialization not in ("pissa", "olora"):
        return method
    scale = 2**0.5 if method.rank_stabilized else 2
    doubled: Mapping[str, Any] = {"rank": 2 * method.rank, "alpha": scale * method.alpha, "initialization": "default"}
    return method.model_copy(update=doubled)
