"""Adapters on disk, in peft's form: writes them from whole tensors, loads them for training or evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from packhorse.errors import UserError
from packhorse.model.sharded import assign

ADAPTER: Final = "default"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PROMPT: Final = f"prompt_encoder.{ADAPTER}.embedding.weight"


def _peft() -> Any:  # noqa: ANN401
    """Import peft by name: it takes six CPU seconds, which full fine-tuning never needs."""
    return import_module("peft")


def adapter_writer(model: Any, weights: dict[str, Tensor], for_base: bool) -> Callable[[Path], None]:  # noqa: ANN401
    """Return a function that writes an adapter in peft's form into a folder, which it creates if needed.

    The model is read now and not by the function, because a step may be changing it by then.

    Args:
        model: Model from `attach`.
        weights: Whole tensors of the trained parameters, by the model's names.
        for_base: Where the method changed the base at the start (PiSSA, OLoRA), write an adapter of twice the rank for
            the unchanged base; otherwise write the trained adapter unchanged.
    """
    config = copy.deepcopy(model.peft_config[ADAPTER])
    initial = getattr(model, "initial_adapter", None)
    if for_base and initial is not None:
        weights = _minus_initial(weights, initial)
        _double_rank(config)
    config.inference_mode = True
    named = _peft_form(model, weights)

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Copies, because safetensors refuses two names of one tensor.
        tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in named.items()}
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
        model.create_or_update_model_card(str(folder))
        config.save_pretrained(str(folder))

    return write


def load_adapter(model: Any, folder: Path) -> None:  # noqa: ANN401
    """Load a saved adapter into one that was attached with the same method.

    Raises:
        UserError: The folder holds another adapter.
    """
    for parameter, value in stored_adapter(model, folder):
        assign(parameter, value)


def stored_adapter(model: Any, folder: Path) -> list[tuple[nn.Parameter, Tensor]]:  # noqa: ANN401
    """Return each trained parameter of a model from `attach` with its value in a saved adapter, on the CPU.

    Raises:
        UserError: The folder holds another adapter.
    """
    _require_safetensors(folder)
    stored: dict[str, Tensor] = _peft().load_peft_weights(str(folder), device="cpu")
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    named = _peft_form(model, trained)
    if stored.keys() != named.keys():
        odd = sorted(stored.keys() ^ named.keys())
        raise UserError(
            f"{folder} holds {len(stored)} tensors, and the method trains {len(named)}; they differ in {odd[0]}.",
            "training can only resume from what the same method wrote.",
            "resume with the recipe that the run began with, or train under another name.",
        )
    by_id = {id(parameter): parameter for parameter in trained.values()}
    return [(by_id[id(parameter)], stored[name]) for name, parameter in named.items()]


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Put a finished adapter on its base, which has rows for new tokens, for evaluation."""
    _require_safetensors(folder)
    adapted: Any = _peft().PeftModel.from_pretrained(model, str(folder))
    if adapted.active_peft_config.is_prompt_learning:
        import_module("packhorse.model.methods.prompts").answer_with_prompt(adapted)
    whole: nn.Module = adapted
    return whole


def _require_safetensors(folder: Path) -> None:
    # peft would try adapter_model.bin next, a pickle.
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{folder} holds no {WEIGHTS_FILE}.",
            "only safetensors are read: a pickle runs code when it is opened.",
            "put the file back; `packhorse verify RUN` shows what else is missing.",
        )


def _peft_form(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ANN401
    """Return the weights by the names in peft's files."""
    if model.peft_config[ADAPTER].is_prompt_learning:
        # peft would read it from the module, which may hold only a shard.
        return {"prompt_embeddings": weights[PROMPT]}
    # peft looks up tied modules by each of their names.
    first = {id(value): name for name, value in model.named_parameters() if name in weights}
    tied = {
        name: weights[first[id(value)]]
        for name, value in model.named_parameters(remove_duplicate=False)
        if name not in weights and id(value) in first
    }
    # Never save whole embeddings with the adapter: rows of new tokens are saved separately.
    state = _peft().get_peft_model_state_dict(model, state_dict=weights | tied, save_embedding_layers=False)
    return dict(state)


def _minus_initial(weights: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return [A; A0] and [B, −B0]: the change of training relative to the unchanged base.

    The base was changed to W − s B0 A0 when training began, so that W − s B0 A0 + s B A = W + s (B A − B0 A0); peft's
    `LoraModel.subtract_mutated_init` computes the same from a second adapter in the model.
    """
    whole = dict(weights)
    for name, start in initial.items():
        rows = ".lora_A." in name
        whole[name] = torch.cat([weights[name], start if rows else -start], dim=0 if rows else 1)
    return whole


def _double_rank(config: Any) -> None:  # noqa: ANN401
    """Double the rank at the same scale."""
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
