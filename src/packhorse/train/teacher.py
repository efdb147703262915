"""The teacher of a distillation: loaded alone before the student, or resident beside it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from packhorse.data.content_key import file_hash
from packhorse.data.data_manifest import read_data_manifest
from packhorse.data.packs.store import PackStore
from packhorse.data.packs.top_tokens import top_tokens_of
from packhorse.data.resolve import data_root
from packhorse.model.attention import register_attention
from packhorse.model.load import ModelRequest, load_model, open_model, weight_files
from packhorse.model.methods.adapter_files import with_adapter
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.teacher import teacher_plan
from packhorse.recipe.locate import expand
from packhorse.recipe.methods import FullMethod
from packhorse.recipe.objectives import DistilObjective
from packhorse.train.engine.precision import COMPUTE_DTYPES
from packhorse.train.engine.process_group import control_group, from_rank_0, own_rank
from packhorse.train.engine.sharding import Fsdp2, Placement, make_mesh
from packhorse.train.loading import place_streamed, place_whole
from packhorse.train.objectives.token_loss import install_loss_head
from packhorse.train.probe import probe_teacher
from packhorse.train.setup import base_request
from packhorse.train.teacher_pass import Passes, missing_blocks, teacher_pass


def load_teacher(
    plan: RunPlan, tokenizer: PreTrainedTokenizerBase, device: torch.device, before_pass: Callable[[], None]
) -> nn.Module:
    """Load the teacher in the precision of the run, frozen, sharded over the ranks where the engine shards weights.

    Args:
        plan: Plan of a run whose objective is distil.
        tokenizer: Tokenizer of the prepared data, which is the teacher's too.
        device: Device of this rank.
        before_pass: Called before each layer is loaded; an exception from it ends the loading.

    Raises:
        UserError: The teacher cannot be loaded, or its documents in a pack see each other.
    """
    request = _request(plan, tokenizer, device)
    placement = _placement(plan, device)
    adapter = plan.teacher.adapter if plan.teacher is not None else None
    weights = open_model(request, len(tokenizer)) if adapter is None else None
    if weights is not None:
        model = place_streamed(weights, _frozen, placement, FullMethod(), plan.recipe.seed, device, before_pass)
    else:
        whole = load_model(placement.whole_first(request), len(tokenizer))
        if adapter is not None:
            merged: Any = with_adapter(whole, Path(expand(adapter)))
            whole = merged.merge_and_unload()
        model = place_whole(whole, _frozen, placement, before_pass)
    return model.requires_grad_(False).eval()


def _request(plan: RunPlan, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> ModelRequest:
    kernel: Any = plan.chosen("model.attention")
    request = base_request(teacher_plan(plan), device, tokenizer, register_attention(kernel))
    return replace(request, dtype=COMPUTE_DTYPES[plan.recipe.precision])


def _frozen(model: PreTrainedModel) -> nn.Module:
    install_loss_head(model)
    frozen: nn.Module = model.requires_grad_(False)
    return frozen


def _placement(plan: RunPlan, device: torch.device) -> Placement:
    """Return FSDP2 where the engine shards weights, also under ZeRO-3: DeepSpeed shards what it trains."""
    engine = plan.topology.engine
    shards = engine in ("fsdp2", "hsdp") or engine.startswith("zero3")
    return Fsdp2(make_mesh(plan.topology, device), plan.recipe.precision) if shards else Placement()


def with_teacher(
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    stores: dict[str, PackStore],
    before_pass: Callable[[], None],
) -> tuple[dict[str, PackStore], nn.Module | None]:
    """Return the stores with the teacher's stored tokens, or the teacher that runs beside the student; a collective.

    A teacher whose tokens are stored is loaded only where some are missing, and freed when a pass has stored them.

    Args:
        plan: Plan of the run; without a distillation, nothing is changed.
        tokenizer: Tokenizer of the prepared data.
        device: Device of this rank.
        stores: Packs by split.
        before_pass: Called before each layer is loaded and before each forward pass.

    Raises:
        UserError: The teacher cannot be loaded, its documents in a pack see each other, or the disk refuses.
        Stopped: A stop was requested; the next attempt continues the pass.
    """
    section = plan.recipe.objective
    if not isinstance(section, DistilObjective):
        return stores, None
    if section.top == "all":
        return stores, _proven(plan, tokenizer, device, stores["train"], before_pass)
    facts = _facts(plan, section, _request(plan, tokenizer, device))
    manifest = read_data_manifest(stores["train"].folder.parent)
    assert manifest is not None
    group = control_group()
    tokens = {split: top_tokens_of(store, facts, manifest.vocab_size) for split, store in stores.items()}
    missing = {split: missing_blocks(each, group) for split, each in tokens.items()}
    if any(missing.values()):
        teacher = _proven(plan, tokenizer, device, stores["train"], before_pass)
        for split, store in stores.items():
            if own_rank() == 0:
                tokens[split].write_facts()
            passes = Passes(store, plan.batch.micro_packs, device, section.temperature, before_pass)
            teacher_pass(teacher, tokens[split], missing[split], passes)
        if group is not None:
            dist.barrier(group)  # no rank reads before all have written
        del teacher
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {split: replace(store, teacher=tokens[split]) for split, store in stores.items()}, None


def _proven(
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    store: PackStore,
    before_pass: Callable[[], None],
) -> nn.Module:
    """Load the teacher, and run the probe on it."""
    teacher = load_teacher(plan, tokenizer, device, before_pass)
    probe_teacher(teacher, device, store, plan.recipe.precision)
    return teacher


def _facts(plan: RunPlan, section: DistilObjective, request: ModelRequest) -> dict[str, Any]:
    """Return what the stored tokens depend on beside the packs; a collective."""
    return {
        "teacher": request.source,
        "weights": _weights_hash(plan, request),
        "top": section.top,
        "temperature": section.temperature,
        "precision": plan.recipe.precision,
        "attention": plan.chosen("model.attention"),
    }


def _weights_hash(plan: RunPlan, request: ModelRequest) -> str:
    """Return a hash of the teacher's weights, which rank 0 computes for all; cached beside the prepared data."""
    assert plan.teacher is not None
    files = [Path(file) for file in weight_files(request)]
    if plan.teacher.adapter is not None:
        files += sorted(Path(expand(plan.teacher.adapter)).glob("*.safetensors"))
    number = 0
    if own_rank() == 0:
        hashes = [file_hash(file, data_root(plan.recipe)) for file in files]
        number = int(hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:15], 16)
    return f"{from_rank_0(number):015x}"
