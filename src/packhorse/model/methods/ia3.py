"""IA³ through peft: trained factors on channels (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from typing import Any

from peft import IA3Config, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN
from torch import nn

from packhorse.errors import UserError
from packhorse.model.methods.attach import Start
from packhorse.model.parameters import closest, module_names
from packhorse.recipe.methods import Ia3Method


def attach(model: Any, method: Ia3Method, start: Start) -> nn.Module:  # noqa: ANN401
    """Freeze the model and add a factor, 1 at the start, to each channel of the targets.

    Raises:
        UserError: peft names no targets for this architecture, or `target` names no module.
    """
    kind = model.config.model_type
    linear = module_names(model, nn.Linear)
    if method.target == "auto":
        if kind not in KNOWN:
            raise UserError(
                f"method.target is auto, and peft names no targets of IA³ for a {kind} model.",
                "the factors belong on keys, values and the MLP's inner channels.",
                f"name them: method.target [k_proj, v_proj, down_proj] and method.feedforward [down_proj]; this model "
                f"has {closest('proj', linear)}.",
            )
        config = IA3Config(task_type="CAUSAL_LM")
    else:
        for target in method.target:
            if not any(name.endswith(f".{target}") for name in linear):
                raise UserError(
                    f"method.target has {target}, which is no linear module of this model.",
                    "a factor without a module trains nothing.",
                    f"the nearest names are {closest(target, linear)}.",
                )
        config = IA3Config(
            task_type="CAUSAL_LM", target_modules=list(method.target), feedforward_modules=list(method.feedforward)
        )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted
