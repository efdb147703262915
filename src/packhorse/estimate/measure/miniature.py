"""A small copy of a planned run, with few and narrow layers and synthetic rows, which runs on a CPU.

It keeps model type, heads, experts, method, engine, processes, groups, passes, packs of a step, optimizer and the
DeepSpeed JSON. It reduces layers, widths, vocabulary and tokens of a pack, and uses bfloat16 in place of fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from packhorse.data.data_manifest import DataManifest, write_data_manifest
from packhorse.data.ledger import Entry, Ledger
from packhorse.data.packs.packing import pack
from packhorse.data.packs.store import write_split
from packhorse.errors import UserError
from packhorse.plan.make_plan import plan_for_topology
from packhorse.plan.run_plan import DataFacts, Decision, RunPlan
from packhorse.recipe.schema import Recipe

LAYERS: Final = 2
HEAD_WIDTH: Final = 16
VOCABULARY: Final = 512
EXPERT_WIDTH: Final = 32
TOKENS_PER_RANK: Final = 32
CONTENT_HASH: Final = "0" * 16
WORD: Final = "a"
STOP: Final = "</s>"
MOST_PARAMETERS: Final = 300_000_000
"""About 4 GB of host memory for a rank that trains the whole model."""


def make_miniature(plan: RunPlan, configuration: Mapping[str, Any] | None, folder: Path) -> RunPlan:
    """Write model and rows below `folder`.

    Returns:
        A plan of one step that the run's engine can execute on a CPU.

    Raises:
        UserError: The architecture is not known, or has no small form.
    """
    if configuration is None:
        raise UserError(
            f"the architecture of {plan.recipe.model.id or plan.recipe.model.path} is not known.",
            "a rehearsal trains a small model of it, and needs its config.json on this machine.",
            "download config.json into the hub's cache, or set model.path.",
        )
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    _write_model(plan, configuration, folder / "model")
    data = _write_rows(plan, folder)
    recipe = _recipe(plan, folder, data.num_tokens // data.num_packs)
    topology = plan.topology.model_copy(update={"device": "cpu", "threads_per_process": torch.get_num_threads()})
    reason = Decision(name="processes", value=str(topology.world_size), reason="as the plan has them")
    return plan_for_topology(recipe, topology, reason, data)


def small_fields(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration of the same architecture with few and narrow layers.

    Raises:
        UserError: transformers has no such architecture.
    """
    fields = {name: value for name, value in configuration.items() if name not in _DROPPED}
    kind = fields.pop("model_type", None)
    try:
        whole = AutoConfig.for_model(kind, **fields)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"transformers cannot build a fresh model of model_type {kind}.",
            "a rehearsal trains a small model of the architecture, without its weights.",
            "set model.id to a model of a type that transformers has, or omit --dry-run.",
        ) from error
    heads = whole.num_attention_heads
    reduced = {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * HEAD_WIDTH,
        "intermediate_size": 2 * heads * HEAD_WIDTH,
        "moe_intermediate_size": EXPERT_WIDTH,
        "shared_expert_intermediate_size": EXPERT_WIDTH,
        "num_hidden_layers": LAYERS,
    }
    if "head_dim" in fields and "qk_rope_head_dim" not in fields:
        reduced["head_dim"] = HEAD_WIDTH
    for name, size in reduced.items():
        if isinstance(getattr(whole, name, None), int):
            fields[whole.attribute_map.get(name, name)] = min(size, getattr(whole, name))
    for name, value in list(fields.items()):
        if isinstance(value, list) and len(value) == whole.num_hidden_layers:
            fields[name] = value[:LAYERS]
    return {**fields, "model_type": kind, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


_DROPPED: Final = (
    "architectures",
    "auto_map",
    "quantization_config",
    "rope_scaling",  # some have a factor for each element of a head, which is narrower here
    "rope_parameters",
    "dtype",
    "torch_dtype",
)


def _write_model(plan: RunPlan, configuration: Mapping[str, Any], folder: Path) -> None:
    fields = small_fields(configuration)
    kind = fields.pop("model_type")
    config = AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise UserError(
            f"a model of {kind} with {LAYERS} narrow layers has {size:,} parameters.",
            f"a rehearsal trains it on this machine, with at most {MOST_PARAMETERS:,} parameters.",
            "set model.config to a smaller model of the same architecture.",
        )
    with torch.random.fork_rng():
        torch.manual_seed(plan.recipe.seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def _write_rows(plan: RunPlan, folder: Path) -> DataFacts:
    """Write the packs of one step, one document each."""
    batch = plan.batch
    length = min(batch.length_tokens, TOKENS_PER_RANK * plan.topology.sequence)
    ids = np.arange(length) % (VOCABULARY - 2) + 2
    lengths = np.full(batch.packs_per_step, length)
    counts = write_split(
        folder / "data" / "train",
        ids=(ids for _ in lengths),
        supervised=(np.ones(length, np.uint8) for _ in lengths),
        lengths=lengths,
        labels=lengths - 1,
        rows=None,
        vocab_size=VOCABULARY,
        length_tokens=length,
        packing=pack(lengths, length, "best_fit", plan.recipe.seed),
    )
    entry = Entry(rows=counts.num_rows, tokens=counts.num_tokens)
    manifest = DataManifest(
        version=plan.packhorse_version,
        content_hash=CONTENT_HASH,
        tokenizer=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        template="none",
        stop_token=STOP,
        length_tokens=length,
        settings={},
        shares=(1.0, 0.0, 0.0),
        shares_reason="synthetic rows",
        sources=(),
        splits={"train": counts},
        fields=(),
        ledger=Ledger(rows_in=entry, losses={}, kept={"train": entry}),
    )
    write_data_manifest(manifest, folder / "data")
    return DataFacts(
        folder=str(folder / "data"),
        tokenizer=manifest.tokenizer,
        **counts.model_dump(exclude={"files"}),
        content_hash=CONTENT_HASH,
    )


def _recipe(plan: RunPlan, folder: Path, length: int) -> Recipe:
    """Return the recipe with the same maths and system for the small model."""
    recipe = plan.recipe
    model = recipe.model.model_copy(
        update={"id": None, "revision": None, "config": None, "path": str(folder / "model"), "tokenizer": None}
        | {"new_tokens": [], "attention": "auto"}
    )
    # On a CPU no optimizer is paged, and DeepSpeed has no fp16.
    optimizer = recipe.optimizer.model_copy(update={"name": recipe.optimizer.name.removeprefix("paged_")})
    return recipe.model_copy(
        update={
            "model": model,
            "runs_folder": str(folder / "runs"),
            "batch": recipe.batch.model_copy(update={"length": length, "micro": plan.batch.micro_packs}),
            "optimizer": optimizer,
            # One step of a small model is no time to compile in, and holds the same.
            "parallel": recipe.parallel.model_copy(update={"compile": False}),
            "precision": "bf16" if recipe.precision == "fp16" else recipe.precision,
            "steps": 1,
            "epochs": None,
        }
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({WORD: 0, STOP: 1}, unk_token=WORD))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=STOP, pad_token=WORD)
