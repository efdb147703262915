"""Low-rank adapters through peft: where they stand, how they start, and what is trained beside them.

Shapes: r rank, A [r, in], B [out, r]; a layer's output is W x + scale B A x.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model, replace_lora_weights_loftq
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from packhorse.errors import UserError
from packhorse.model.methods.attach import Start
from packhorse.model.methods.named import closest, module_names
from packhorse.recipe.methods import LoraMethod, QloraMethod

ADAPTER: Final = "default"
# peft's names. LoftQ starts from plain adapters and replaces them once the quantised weights are there.
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
    """Freezes the model and adds low-rank adapters (Hu et al. 2021, arXiv 2106.09685).

    Raises:
        UserError: `target`, `train_also` or `experts` names what this model does not have, or what cannot be trained.
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
            "an adapter that is nowhere trains nothing.",
            f"set method.target to all-linear, or to some of {', '.join(linear)}.",
        ) from error
    _refuse_missed_targets(adapted, method)
    if method.initialization in CHANGES_BASE:
        # The way back to the unchanged base: what was taken out of it, kept on the host.
        adapted.initial_adapter = _adapter_weights(adapted)
    elif not on_meta:
        for name, layer in adapted.named_modules():
            if isinstance(layer, LoraLayer):
                draw_adapter(layer, name, method, start.seed)
    if method.initialization == "loftq" and not start.resumed:
        _mend_quantization(adapted, start)
    return adapted  # type: ignore[no-any-return]


def draw_adapter(layer: LoraLayer, name: str, method: LoraMethod, seed: int) -> None:
    """Draws one layer's adapter by peft's own rule, seeded by its name: the same on every rank, in any order.

    Args:
        layer: With real, unsharded adapter weights; base weights are read under DoRA only.
        name: Of the layer in the peft model, such as `base_model.model.model.layers.0.self_attn.q_proj`.
        method: Its initialisation must be one of `DRAWN`.
        seed: The recipe's.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
    if method.initialization != "orthogonal":
        layer.reset_lora_parameters(ADAPTER, INITIALIZATIONS[method.initialization])
    else:
        _draw_orthogonal(layer)
    if method.dora:
        # The magnitude is that of base and adapter together, which are what they are only now.
        layer.lora_variant[ADAPTER].init(layer, adapter_name=ADAPTER)
        layer.lora_magnitude_vector[ADAPTER].float()


def _draw_orthogonal(layer: LoraLayer) -> None:
    parts = [layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]]
    kept = [part.weight for part in parts]
    layer.orthogonal_init(ADAPTER)
    for part, parameter in zip(parts, kept, strict=True):
        # peft puts new parameters there, on the CPU and in the base's type.
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
            "the head computes the loss itself, in chunks, and an adapter beside it would be left out.",
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
                "it would stay as it is, though the recipe says that it is adapted.",
                f"take {target} out of method.target; the nearest names are {closest(target, module_names(model))}.",
            )


def _expert_weights(model: nn.Module) -> list[str]:
    """Names of fused experts' weights [experts, out, in], which are parameters and no linear modules."""
    return sorted(
        {
            ".".join(name.split(".")[-2:])
            for name, parameter in model.named_parameters()
            # ZeRO-3 keeps the true shape beside an emptied tensor.
            if len(getattr(parameter, "ds_shape", parameter.shape)) == 3 and ".experts." in name
        }
    )


def _adapted_experts(experts: list[str], method: LoraMethod) -> list[str] | None:
    if not method.experts:
        return None
    if not experts:
        raise UserError(
            "method.experts is true, and this model has no fused expert weights.",
            "they are what it puts adapters on.",
            "remove method.experts: the linear layers of all other models are reached by method.target.",
        )
    return experts


def _targets(model: Any, method: LoraMethod) -> list[str]:  # noqa: ANN401
    """Names of linear modules of a mixture of experts, as peft takes them.

    There peft reads all-linear, and the names that experts had before they were fused, as experts and router.
    """
    head = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and part is not head
    }
    wanted = linear if method.target == "all-linear" else set(method.target)
    lost = sorted(wanted & EXPERT_NAMES)
    if lost:
        raise UserError(
            f"method.target covers {', '.join(lost)}, and this model is a mixture of experts.",
            "peft takes these names for the fused experts, and leaves linear modules that are called so as they are.",
            f"set method.target to {sorted(linear - EXPERT_NAMES)}; method.experts: true adapts the experts.",
        )
    return sorted(wanted)


def _check_train_also(model: Any, method: LoraMethod) -> bool:  # noqa: ANN401
    """Refuses names that cannot be trained whole; says whether tied modules are among them."""
    every = module_names(model)
    for wanted in method.train_also:
        found = [name for name in every if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise UserError(
                f"method.train_also has {wanted}, which is no module of this model.",
                "peft would leave it out without a word.",
                f"the nearest names are {closest(wanted, every)}.",
            )
        packed = [name for name in found for weight in model.get_submodule(name).parameters() if _is_quantized(weight)]
        if packed:
            raise UserError(
                f"method.train_also has {wanted}, whose weights are quantised ({packed[0]}).",
                "a few bits have no gradient.",
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
            "they are one tensor: what is done to one is done to the other.",
            f"add {other} to method.train_also too, or take both out.",
        )
    return all(named)


def _is_quantized(weight: nn.Parameter) -> bool:
    return hasattr(weight, "quant_state") or weight.dtype == torch.int8


def _is_named(name: str, wanted: list[str]) -> bool:
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def _token_rows(model: Any, method: LoraMethod, ids: tuple[int, ...]) -> dict[str, list[int]] | None:  # noqa: ANN401
    """Rows of embedding and output head that are trained, by module; modules that are trained whole need none."""
    ends = [_name_of(model, model.get_input_embeddings())]
    if not model.config.get_text_config().tie_word_embeddings:  # peft follows tied ones by itself
        ends.append(_name_of(model, model.get_output_embeddings()))
    rows = {name: list(ids) for name in ends if not _is_named(name, method.train_also)}
    return rows if ids and rows else None


def _name_of(model: nn.Module, part: nn.Module) -> str:
    found: str = next(name for name, each in model.named_modules() if each is part)
    return found


def _mend_quantization(model: Any, start: Start) -> None:  # noqa: ANN401
    """Starts the adapters from what quantisation took away (LoftQ, Li et al. 2023, arXiv 2310.08659)."""
    if start.source is None or not any(start.source.glob("*.safetensors")):
        raise UserError(
            f"method.initialization is loftq, and {start.source} holds no .safetensors file.",
            "it compares the quantised weights with those on disk.",
            "set model.path to a local folder with safetensors files, or method.initialization: default.",
        )
    replace_lora_weights_loftq(model, str(start.source))
