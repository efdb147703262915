"""Low-rank adapters through peft: their targets, their start, and what is trained with them.

Shapes: r rank, A [r, in], B [out, r]; a layer's output is W x + scale B A x.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model, replace_lora_weights_loftq
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from packhorse.model.methods.attach import Start
from packhorse.model.parameters import names_of_model
from packhorse.model.units import score_name
from packhorse.model_spec.method_names import (
    ModelNames,
    check_method,
    is_named,
    linear_targets,
    no_adapter,
    trains_tied,
)
from packhorse.model_spec.stored_weights import require_safetensors
from packhorse.recipe.methods import AdapterMethod, LoraMethod, QloraMethod

ADAPTER: Final = "default"
# peft's names. LoftQ starts from plain adapters and replaces them once the quantised weights are loaded.
INITIALIZATIONS: Final[Mapping[str, bool | str]] = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "olora": "olora",
    "pissa": "pissa",
    "loftq": True,
}
DRAWN: Final = ("default", "gaussian", "orthogonal", "loftq")
CHANGES_BASE: Final = ("olora", "pissa")


def attach(model: Any, method: LoraMethod | QloraMethod, start: Start) -> nn.Module:  # noqa: ANN401
    """Freeze the model and add low-rank adapters (Hu et al. 2021, arXiv 2106.09685).

    Raises:
        UserError: `target`, `train_also` or `experts` names modules that this model lacks, or that cannot be trained.
    """
    names = names_of_model(model)
    check_method(method, names)
    config = LoraConfig(
        # peft then also trains the score head whole.
        task_type="CAUSAL_LM" if score_name(model) is None else "SEQ_CLS",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        # For a mixture of experts peft takes all-linear as experts and router.
        target_modules=sorted(linear_targets(method, names)) if names.experts else method.target,
        target_parameters=list(names.experts) if method.experts else None,
        use_rslora=method.rank_stabilized,
        use_dora=method.dora,
        init_lora_weights=INITIALIZATIONS[method.initialization],
        modules_to_save=list(method.train_also) or None,
        trainable_token_indices=_token_rows(names, method, start.new_token_ids),
        ensure_weight_tying=trains_tied(method, names),
    )
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    adapted: Any = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    _refuse_missed_targets(adapted, method, names)
    if method.initialization in CHANGES_BASE:
        # The start was subtracted from the base; it is kept on the host to write an adapter for the unchanged base.
        adapted.initial_adapter = _adapter_weights(adapted)
    elif not on_meta:
        for name, layer in adapted.named_modules():
            if isinstance(layer, LoraLayer):
                draw_adapter(layer, name, method, start.seed)
    if method.initialization == "loftq" and not start.resumed:
        _start_from_quantization_error(adapted, start)
    return adapted  # type: ignore[no-any-return]


def draw_adapter(layer: LoraLayer, name: str, method: LoraMethod, seed: int) -> None:
    """Draw one layer's adapter by peft's own rule, seeded by its name: equal on every rank, in any order.

    Args:
        layer: Layer with real, unsharded adapter weights; base weights are read under DoRA only.
        name: Name of the layer in the peft model, such as `base_model.model.model.layers.0.self_attn.q_proj`.
        method: Method whose initialisation is one of `DRAWN`.
        seed: Seed of the recipe.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
    if method.initialization != "orthogonal":
        layer.reset_lora_parameters(ADAPTER, INITIALIZATIONS[method.initialization])
    else:
        _draw_orthogonal(layer)
    if method.dora:
        # The magnitude is computed from base and adapter together, which are complete only now.
        layer.lora_variant[ADAPTER].init(layer, adapter_name=ADAPTER)
        layer.lora_magnitude_vector[ADAPTER].float()


def keep_input_dtype(model: nn.Module) -> None:
    """Switch off peft's cast of each layer's input to the adapter's float32, which autocast rounds back.

    Without dropout the result is the same, bit for bit; the casts take 15 % of a pass of an 8B model on a GPU.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False


def make_adapters(parts: Mapping[str, nn.Module], method: AdapterMethod, seed: int, device: torch.device) -> None:
    """Create the adapters that `attach` left on the meta device, with the same start as on a real model.

    Args:
        parts: Modules of a unit by their names in the peft model; the base's weights among them are loaded.
        method: Method of the recipe.
        seed: Seed of random values.
        device: Device of the adapters.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # keeps tied parameters tied
    for part in parts.values():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                part._parameters[name] = made.setdefault(parameter, nn.Parameter(empty, parameter.requires_grad))
    _copy_originals([part for part in parts.values() if isinstance(part, ModulesToSaveWrapper)])
    for name, part in parts.items():
        if isinstance(part, IA3Layer):
            part.reset_ia3_parameters(ADAPTER)
        elif isinstance(part, LoraLayer):
            assert isinstance(method, LoraMethod)
            draw_adapter(part, name, method, seed)


def _copy_originals(wrappers: list[ModulesToSaveWrapper]) -> None:
    """Copy the values of originals into copies that are trained whole; copies of tied weights are tied."""
    copied: dict[nn.Parameter, nn.Parameter] = {}
    for wrapper in wrappers:
        twin = wrapper.modules_to_save[ADAPTER]
        twin.load_state_dict(wrapper.original_module.state_dict())
        for name, original in wrapper.original_module.named_parameters():
            module, _, last = name.rpartition(".")
            setattr(twin.get_submodule(module), last, copied.setdefault(original, twin.get_parameter(name)))


def _draw_orthogonal(layer: LoraLayer) -> None:
    parts = [layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]]
    parameters = [part.weight for part in parts]
    layer.orthogonal_init(ADAPTER)
    for part, parameter in zip(parts, parameters, strict=True):
        # peft has replaced them with new parameters, on the CPU and in the base's dtype.
        parameter.data.copy_(part.weight)
        part.weight = parameter


def _adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def _refuse_missed_targets(model: nn.Module, method: LoraMethod, names: ModelNames) -> None:
    if isinstance(method.target, str):
        return
    adapted = [name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    for target in method.target:
        if not any(name.endswith(f".{target}") for name in adapted):
            raise no_adapter(target, method.target, names.linear)


def _token_rows(names: ModelNames, method: LoraMethod, ids: tuple[int, ...]) -> dict[str, list[int]] | None:
    """Return the trained rows of embedding and output head by module, unless the module is trained whole."""
    ends = [names.embedding] if names.tied else [names.embedding, names.head]  # peft handles tied ones
    rows = {name: list(ids) for name in ends if not is_named(name, method.train_also)}
    return rows if ids and rows else None


def _start_from_quantization_error(model: Any, start: Start) -> None:  # noqa: ANN401
    """Set the adapters to the quantisation error (LoftQ, Li et al. 2023, arXiv 2310.08659)."""
    require_safetensors(start.source)
    replace_lora_weights_loftq(model, str(start.source))
