"""From a plan to what trains: which weights, which method, which kernel; and to the packs of a rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.loader import PackLoader
from packhorse.data.packs.store import open_store
from packhorse.data.render.tokenizer import pieces_before
from packhorse.model.attention import register_attention
from packhorse.model.load import DTYPES, ModelRequest, Quantization, load_model, open_model
from packhorse.model.methods.attach import Start, attach, load_adapter
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.locate import expand
from packhorse.recipe.methods import QloraMethod
from packhorse.run_folder.layout import ADAPTER_FOLDER, MODEL_FOLDER
from packhorse.train.assembly import BetweenUnits, can_stream, place_streamed, place_whole
from packhorse.train.engine.activation_checkpointing import apply_checkpointing
from packhorse.train.engine.precision import COMPUTE_DTYPES
from packhorse.train.engine.sharding import placement_of
from packhorse.train.objectives.token_loss import install_loss_head


def step_loader(plan: RunPlan, rank: int, pinned: bool) -> PackLoader:
    """A rank's share of every step.

    Args:
        plan: With its data.
        rank: Of the process.
        pinned: Into memory that a GPU fetches from by itself.
    """
    assert plan.data is not None, "a plan is only run once its data is prepared"
    store = open_store(Path(plan.data.folder), "train")
    return PackLoader(
        store=store,
        batch_plan=BatchPlan(store.pack_costs, plan.batch.packs_per_step, plan.recipe.seed, store.in_order),
        rank=rank // plan.topology.sequence,  # neighbours share their packs
        world_size=plan.topology.data_ranks,
        accumulation_steps=plan.batch.accumulation_steps,
        device_pin=pinned,
    )


def base_request(
    plan: RunPlan, device: torch.device, tokenizer: PreTrainedTokenizerBase, attention: str
) -> ModelRequest:
    """The weights that the run starts from, as the plan has them."""
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
    )


def training_model(
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    checkpoint: Path | None,
    between_units: BetweenUnits,
) -> nn.Module:
    """Loads the base, or the checkpoint's weights, makes it ready to train and puts it where the engine wants it.

    Args:
        plan: What trains.
        tokenizer: Of the prepared data.
        device: Of this rank.
        checkpoint: To go on from.
        between_units: Called before each layer is loaded; what it raises ends the loading.

    Raises:
        UserError: The model cannot be loaded, or does not fit the tokenizer or the method.
    """
    request = base_request(plan, device, tokenizer, register_attention(_kernel(plan)))
    method = plan.recipe.method
    if method.trains_base and checkpoint is not None:
        request = from_folder(request, checkpoint / MODEL_FOLDER)
    start = method_start(plan, tokenizer, resumed=checkpoint is not None)

    def attached(base: PreTrainedModel) -> nn.Module:
        _stop_at(base, tokenizer)
        model: Any = attach(base, method, start)
        install_loss_head(model)
        apply_checkpointing(model, plan.recipe.parallel)
        return model  # type: ignore[no-any-return]

    placement = placement_of(plan, device)
    weights = open_model(request, len(tokenizer)) if can_stream(method) else None
    if weights is not None:
        model = place_streamed(weights, attached, placement, method, start.seed, device, between_units)
    else:
        model = place_whole(
            load_model(placement.whole_first(request), len(tokenizer)), attached, placement, between_units
        )
    if not method.trains_base and checkpoint is not None:
        load_adapter(model, checkpoint / ADAPTER_FOLDER)
    return model.train()


def method_start(plan: RunPlan, tokenizer: PreTrainedTokenizerBase, resumed: bool) -> Start:
    """What the method starts from beside the base."""
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
    """The same of weights that training wrote, which have all rows."""
    return replace(request, source=str(folder), revision=None, config=None, new_tokens={})


def _new_tokens(plan: RunPlan, tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[int, ...]]:
    model = plan.recipe.model
    if not model.new_tokens:
        return {}
    assert plan.data is not None
    pieces = pieces_before(Path(plan.data.tokenizer), model.new_tokens, model.trust_remote_code)
    return {tokenizer.convert_tokens_to_ids(token): pieces[token] for token in model.new_tokens}


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
