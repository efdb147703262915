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

from packhorse.errors import UserError
from packhorse.model.methods.attach import Start
from packhorse.model.parameters import closest, module_names
from packhorse.model.sharded import true_shape
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
EXPERT_NAMES: Final = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
CHANGES_BASE: Final = ("olora", "pissa")


def attach(model: Any, method: LoraMethod | QloraMethod, start: Start) -> nn.Module:  # noqa: ANN401
    """Freeze the model and add low-rank adapters (Hu et al. 2021, arXiv 2106.09685).

    Raises:
        UserError: `target`, `train_also` or `experts` names modules that this model lacks, or that cannot be trained.
    """
    _refuse_output_head(model, method)
    tied = _check_train_also(model, method)
    experts = _expert_weights(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=_targets(model, method) if experts else method.target,
        target_parameters=_adapted_experts(experts, method),
        use_rslora=method.rank_stabilized,
        use_dora=method.dora,
        init_lora_weights=INITIALIZATIONS[method.initialization],
        modules_to_save=list(method.train_also) or None,
        trainable_token_indices=_token_rows(model, method, start.new_token_ids),
        ensure_weight_tying=tied,
    )
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    try:
        adapted: Any = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        linear = sorted({name.rsplit(".", 1)[-1] for name in module_names(model, nn.Linear)})
        raise UserError(
            f"method.target {method.target} names no module of this model.",
            "an adapter without a module trains nothing.",
            f"set method.target to all-linear, or to some of {', '.join(linear)}.",
        ) from error
    _refuse_missed_targets(adapted, method)
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


def _refuse_output_head(model: Any, method: LoraMethod) -> None:  # noqa: ANN401
    head = model.get_output_embeddings()
    name = next((name for name, part in model.named_modules() if part is head), "lm_head").rsplit(".", 1)[-1]
    if isinstance(method.target, list) and name in method.target:
        raise UserError(
            f"method.target names {name}, the output head.",
            "the head computes the loss itself, in chunks, and an adapter on it would be ignored.",
            f"take {name} out of method.target; method.train_also: [{name}] trains it whole.",
        )


def _refuse_missed_targets(model: nn.Module, method: LoraMethod) -> None:
    if isinstance(method.target, str):
        return
    adapted = [name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    for target in method.target:
        if not any(name.endswith(f".{target}") for name in adapted):
            raise UserError(
                f"method.target has {target}, which gets no adapter in this model.",
                "it would stay unchanged, although the recipe says that it is adapted.",
                f"take {target} out of method.target; the nearest names are {closest(target, module_names(model))}.",
            )


def _expert_weights(model: nn.Module) -> list[str]:
    """Return the names of fused experts' weights [experts, out, in], which are parameters and not linear modules."""
    return sorted(
        {
            ".".join(name.split(".")[-2:])
            for name, parameter in model.named_parameters()
            if len(true_shape(parameter)) == 3 and ".experts." in name
        }
    )


def _adapted_experts(experts: list[str], method: LoraMethod) -> list[str] | None:
    if not method.experts:
        return None
    if not experts:
        raise UserError(
            "method.experts is true, and this model has no fused expert weights.",
            "it puts adapters on these weights.",
            "remove method.experts: method.target reaches the linear layers of all other models.",
        )
    return experts


def _targets(model: Any, method: LoraMethod) -> list[str]:  # noqa: ANN401
    """Return the names of linear modules of a mixture of experts in a form that peft reads correctly.

    For such models peft takes all-linear, and the names that experts had before they were fused, as experts and router.
    """
    head = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and part is not head
    }
    targets = linear if method.target == "all-linear" else set(method.target)
    mistaken = sorted(targets & EXPERT_NAMES)
    if mistaken:
        raise UserError(
            f"method.target covers {', '.join(mistaken)}, and this model is a mixture of experts.",
            "peft takes these names for the fused experts, and does not adapt linear modules with these names.",
            f"set method.target to {sorted(linear - EXPERT_NAMES)}; method.experts: true adapts the experts.",
        )
    return sorted(targets)


def _check_train_also(model: Any, method: LoraMethod) -> bool:  # noqa: ANN401
    """Refuse names that cannot be trained whole; return whether tied modules are among them."""
    names = module_names(model)
    for wanted in method.train_also:
        matches = [name for name in names if _is_named(name, [wanted])]
        if not matches:
            raise UserError(
                f"method.train_also has {wanted}, which is no module of this model.",
                "peft would silently ignore it.",
                f"the nearest names are {closest(wanted, names)}.",
            )
        weights = [(name, weight) for name in matches for weight in model.get_submodule(name).parameters()]
        quantized = [name for name, weight in weights if _is_quantized(weight)]
        if quantized:
            raise UserError(
                f"method.train_also has {wanted}, whose weights are quantised ({quantized[0]}).",
                "weights in few bits have no gradient.",
                f"take {wanted} out of method.train_also: method.target gives it an adapter.",
            )
    if not model.config.get_text_config().tie_word_embeddings:
        return False
    ends = [_name_of(model, model.get_input_embeddings()), _name_of(model, model.get_output_embeddings())]
    named = [_is_named(name, method.train_also) for name in ends]
    if any(named) and not all(named):
        other = ends[named.index(False)].rsplit(".", 1)[-1]
        raise UserError(
            f"method.train_also names {ends[named.index(True)]}, which this model ties to {ends[named.index(False)]}.",
            "they are one tensor, so both train or neither does.",
            f"add {other} to method.train_also too, or remove both.",
        )
    return all(named)


def _is_quantized(weight: nn.Parameter) -> bool:
    return hasattr(weight, "quant_state") or weight.dtype == torch.int8


def _is_named(name: str, wanted: list[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _token_rows(model: Any, method: LoraMethod, ids: tuple[int, ...]) -> dict[str, list[int]] | None:  # noqa: ANN401
    """Return the trained rows of embedding and output head by module, unless the module is trained whole."""
    ends = [_name_of(model, model.get_input_embeddings())]
    if not model.config.get_text_config().tie_word_embeddings:  # peft handles tied ones
        ends.append(_name_of(model, model.get_output_embeddings()))
    rows = {name: list(ids) for name in ends if not _is_named(name, method.train_also)}
    return rows if ids and rows else None


def _name_of(model: nn.Module, part: nn.Module) -> str:
    match: str = next(name for name, module in model.named_modules() if module is part)
    return match


def _start_from_quantization_error(model: Any, start: Start) -> None:  # noqa: ANN401
    """Set the adapters to the quantisation error (LoftQ, Li et al. 2023, arXiv 2310.08659)."""
    if start.source is None or not any(start.source.glob("*.safetensors")):
        raise UserError(
            f"method.initialization is loftq, and {start.source} holds no .safetensors file.",
            "it compares the quantised weights with those on disk.",
            "set model.path to a local folder with safetensors files, or method.initialization: default.",
        )
    replace_lora_weights_loftq(model, str(start.source))
