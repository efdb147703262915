"""IA³ through peft: trained factors on channels (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from typing import Any

from peft import IA3Config, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN
from torch import nn

from packhorse.model.methods.attach import Start
from packhorse.model.parameters import names_of_model
from packhorse.model_spec.method_names import check_method, unknown_ia3
from packhorse.recipe.methods import Ia3Method


def attach(model: Any, method: Ia3Method, start: Start) -> nn.Module:  # noqa: ANN401
    """Freeze the model and add a factor, 1 at the start, to each channel of the targets.

    Raises:
        UserError: peft names no targets for this architecture, or `target` names no module.
    """
    names = names_of_model(model)
    check_method(method, names)
    if method.target == "auto" and names.family not in KNOWN:
        raise unknown_ia3(names.family, names.linear)
    config = IA3Config(task_type="CAUSAL_LM")
    if method.target != "auto":
        config = IA3Config(
            task_type="CAUSAL_LM", target_modules=list(method.target), feedforward_modules=list(method.feedforward)
        )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted
