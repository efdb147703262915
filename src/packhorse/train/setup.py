"""From a plan to the model that trains: which weights, which adapter, which kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from packhorse.model.adapters import add_lora
from packhorse.model.attention import register_attention
from packhorse.model.load import DTYPES, ModelRequest, Quantization, load_model
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.locate import expand
from packhorse.recipe.methods import LoraMethod, QloraMethod
from packhorse.train.objective import install_loss_head


def base_request(
    plan: RunPlan, device: torch.device, tokenizer: PreTrainedTokenizerBase, attention: str
) -> ModelRequest:
    """The weights that the run starts from, as the plan has them."""
    model, method = plan.recipe.model, plan.recipe.method
    dtype = DTYPES[plan.chosen("model.dtype")]
    quantization = None
    if isinstance(method, QloraMethod):
        compute = torch.bfloat16 if plan.recipe.precision == "bf16" else torch.float32
        quantization = Quantization(method.quantization, method.double_quantization, compute)
    return ModelRequest(
        source=expand(plan.base_model) if plan.base_model is not None else None,
        revision=model.revision,
        config=_fresh_config(model.config, tokenizer) if model.config is not None else None,
        seed=plan.recipe.seed,
        dtype=dtype,
        attention=attention,
        quantization=quantization,
        trust_remote_code=model.trust_remote_code,
        device=device,
    )


def training_model(
    plan: RunPlan, tokenizer: PreTrainedTokenizerBase, device: torch.device, checkpoint: Path | None
) -> nn.Module:
    """Loads the base, or the checkpoint's weights, and makes it ready to train.

    Raises:
        UserError: The model cannot be loaded, or does not fit the tokenizer or the method.
    """
    request = base_request(plan, device, tokenizer, register_attention(_kernel(plan)))
    full = plan.recipe.method.kind == "full"
    if full and checkpoint is not None:
        request = _from_folder(request, checkpoint / "model")
    model: Any = load_model(request, len(tokenizer))
    _stop_at(model, tokenizer)
    install_loss_head(model)
    if plan.recipe.parallel.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if full:
        return model.train()  # type: ignore[no-any-return]
    if checkpoint is not None:
        adapted: nn.Module = PeftModel.from_pretrained(model, checkpoint / "adapter", is_trainable=True)
        return adapted.train()
    # Adapters are drawn at random: every rank must draw the same.
    torch.manual_seed(plan.recipe.seed)
    assert isinstance(plan.recipe.method, LoraMethod)
    return add_lora(model, plan.recipe.method).train()


def _from_folder(request: ModelRequest, folder: Path) -> ModelRequest:
    fields = {name: getattr(request, name) for name in ModelRequest.__dataclass_fields__}
    return ModelRequest(**{**fields, "source": str(folder), "revision": None, "config": None})


def _kernel(plan: RunPlan) -> Any:  # noqa: ANN401
    return plan.chosen("model.attention")


def _fresh_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The recipe's configuration; what only the tokenizer knows is taken from it."""
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**ids, **config}


def _stop_at(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: ANN401
    """Lets the saved model stop where training taught it to stop."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
