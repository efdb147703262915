"""Builds what trains from the plan: the model with its method, kernel and shards, and this rank's packs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.loader import PackLoader
from packhorse.data.packs.store import PackStore, open_store
from packhorse.data.render.tokenizer import pieces_before
from packhorse.model.attention import register_attention
from packhorse.model.load import DTYPES, ModelRequest, Quantization, load_model, open_model
from packhorse.model.methods.adapter_files import load_adapter
from packhorse.model.methods.attach import Start, attach
from packhorse.model.units import layers_of
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.locate import expand
from packhorse.recipe.methods import QloraMethod
from packhorse.recipe.objectives import RewardObjective
from packhorse.recipe.schema import ParallelSection
from packhorse.run_folder.layout import ADAPTER_FOLDER, MODEL_FOLDER
from packhorse.train.activation_offload import offload_layer_inputs
from packhorse.train.compilation import compile_layers
from packhorse.train.engine.precision import COMPUTE_DTYPES
from packhorse.train.engine.sharding import placement_of
from packhorse.train.loading import BeforeUnit, can_stream, place_streamed, place_whole
from packhorse.train.objectives.token_loss import install_loss_head


def step_loader(plan: RunPlan, rank: int, pinned: bool, store: PackStore | None = None) -> PackLoader:
    """Return the loader of a rank's share of every step.

    Args:
        plan: Plan of the run.
        rank: This rank.
        pinned: Whether to use pinned memory, from which a GPU copies asynchronously.
        store: Training packs; None opens those of the plan.
    """
    assert plan.data is not None, "a plan is only run once its data is prepared"
    store = store or open_store(Path(plan.data.folder), "train")
    return PackLoader(
        store=store,
        batch_plan=BatchPlan(store.pack_costs, plan.batch.packs_per_step, plan.recipe.seed, store.in_order),
        rank=rank // plan.topology.sequence,  # neighbouring ranks share their packs
        world_size=plan.topology.data_ranks,
        accumulation_steps=plan.batch.accumulation_steps,
        device_pin=pinned,
        part=rank % plan.topology.sequence,
        num_parts=plan.topology.sequence,
    )


def base_request(
    plan: RunPlan, device: torch.device, tokenizer: PreTrainedTokenizerBase, attention: str
) -> ModelRequest:
    """Return the request for the weights that the run starts from."""
    model, method = plan.recipe.model, plan.recipe.method
    dtype = DTYPES[plan.chosen("model.dtype")]
    quantization = None
    if isinstance(method, QloraMethod):
        compute = COMPUTE_DTYPES[plan.recipe.precision]
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
        new_tokens=_new_tokens(plan, tokenizer) if model.config is None else {},
        is_scored=isinstance(plan.recipe.objective, RewardObjective),
    )


def training_model(
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    checkpoint: Path | None,
    before_unit: BeforeUnit,
) -> nn.Module:
    """Load the base or the checkpoint's weights, attach the method, and place the model as the engine needs it.

    Args:
        plan: Plan of the run.
        tokenizer: Tokenizer of the prepared data.
        device: Device of this rank.
        checkpoint: Checkpoint to resume from.
        before_unit: Called before each layer is loaded; an exception from it ends the loading.

    Raises:
        UserError: The model cannot be loaded, or does not fit the tokenizer or the method.
    """
    kernel: Any = plan.chosen("model.attention")
    request = base_request(plan, device, tokenizer, register_attention(kernel))
    method = plan.recipe.method
    if method.trains_base and checkpoint is not None:
        request = from_folder(request, checkpoint / MODEL_FOLDER)
    start = method_start(plan, tokenizer, resumed=checkpoint is not None)

    def attached(base: PreTrainedModel) -> nn.Module:
        _set_stop_tokens(base, tokenizer)
        model: Any = attach(base, method, start, autocast=plan.recipe.precision != "fp32")
        install_loss_head(model)
        apply_checkpointing(model, plan.recipe.parallel)
        if plan.compiles_layers:
            compile_layers([base.get_submodule(name) for name in layers_of(base)], Path(plan.run_folder).parent)
        return model  # type: ignore[no-any-return]

    placement = placement_of(plan, device)
    weights = open_model(request, len(tokenizer)) if can_stream(method) else None
    if weights is not None:
        model = place_streamed(weights, attached, placement, method, start.seed, device, before_unit)
    else:
        whole = load_model(placement.whole_first(request), len(tokenizer))
        model = place_whole(whole, attached, placement, before_unit)
    if not method.trains_base and checkpoint is not None:
        load_adapter(model, checkpoint / ADAPTER_FOLDER)
    return model.train()


def apply_checkpointing(model: Any, parallel: ParallelSection) -> None:  # noqa: ANN401
    """Recompute layers in the backward pass as `parallel.checkpointing` says (Chen et al. 2016, arXiv 1604.06174).

    Only the input of a recomputed layer is stored, with `parallel.offload_activations` in pinned host memory, and with
    `selective` the result of attention (Korthikanti et al. 2022, arXiv 2205.05198); the weights stay on the device.

    Args:
        model: A transformers model, with or without an adapter around it.
        parallel: The recipe's section.
    """
    if parallel.checkpointing is False:
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if parallel.checkpointing == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _attention_kernels())
    model.activation_checkpointing_enable(settings, every_n_layers=parallel.recomputed_every)
    if parallel.offload_activations:
        offload_layer_inputs(model)


def _attention_kernels() -> list[OpOverload]:
    """Return the operators whose results selective checkpointing keeps: attention, whatever kernel torch chooses."""
    aten = torch.ops.aten
    return [
        torch.ops.torch_attn._varlen_attn.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]


def method_start(plan: RunPlan, tokenizer: PreTrainedTokenizerBase, resumed: bool) -> Start:
    """Return what the method starts from, other than the base model."""
    assert plan.data is not None
    source = expand(plan.base_model) if plan.base_model is not None else None
    return Start(
        seed=plan.recipe.seed,
        tokenizer=Path(plan.data.tokenizer),
        new_token_ids=tuple(tokenizer.convert_tokens_to_ids(token) for token in plan.recipe.model.new_tokens),
        source=Path(source) if source is not None else None,
        resumed=resumed,
    )


def from_folder(request: ModelRequest, folder: Path) -> ModelRequest:
    """Return the request for weights that training wrote; they contain the rows of new tokens."""
    return replace(request, source=str(folder), revision=None, config=None, new_tokens={})


def _new_tokens(plan: RunPlan, tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[int, ...]]:
    model = plan.recipe.model
    if not model.new_tokens:
        return {}
    assert plan.data is not None
    pieces = pieces_before(Path(plan.data.tokenizer), model.new_tokens, model.trust_remote_code)
    return {tokenizer.convert_tokens_to_ids(token): pieces[token] for token in model.new_tokens}


def _fresh_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the recipe's configuration, with the vocabulary size and special tokens of the tokenizer."""
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**ids, **config}


def _set_stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: ANN401
    """Make the saved model stop at the token that training teaches it; a reward model must know the padding token."""
    if not model.can_generate():
        # The score is read at the last token that is no padding, which must not be the stop token.
        has_own = tokenizer.pad_token_id != tokenizer.eos_token_id
        model.config.pad_token_id = tokenizer.pad_token_id if has_own else None
        return
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
