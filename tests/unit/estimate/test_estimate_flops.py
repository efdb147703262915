"""Operations counted from the configuration against those that torch counts while the real model trains."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from packhorse.data.packs.loader import lay_out
from packhorse.estimate.flops import PassWork, pairs_of_pack, pass_work
from packhorse.estimate.measure.fake_tensors import measure_shape
from packhorse.estimate.packs import PackFigures
from packhorse.model.attention import register_attention
from packhorse.model.methods.attach import Start, attach
from packhorse.model_spec.configuration import published
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from packhorse.train.objectives.forward import micro_batch_loss
from packhorse.train.objectives.token_loss import install_loss_head
from packhorse.train.setup import apply_checkpointing

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # of peft, about GPT-2's own linear layers
]

LENGTHS = (48, 48, 48)
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 16},
    "phi3": {"model_type": "phi3", **SMALL, "pad_token_id": 0},
    "mixtral": {"model_type": "mixtral", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    # These are not described: they are measured on fake tensors.
    "gpt_neox": {"model_type": "gpt_neox", **SMALL},
    "olmo2": {"model_type": "olmo2", **SMALL, "pad_token_id": 0},
    "gpt2": {"model_type": "gpt2", **SMALL, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
    "granitemoe": {"model_type": "granitemoe", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}
METHODS: dict[str, Any] = {
    "full": "full",
    "partial, last layers": {"kind": "partial", "last_layers": 2},
    "partial, some weights": {
        "kind": "partial",
        "train": ["model.layers.1.mlp.*", "model.layers.3.self_attn.o_proj.*"],
    },
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.0},
    "lora on queries": {"kind": "lora", "rank": 4, "dropout": 0.0, "target": ["q_proj", "v_proj"]},
    "prompt": {"kind": "prompt_tuning", "virtual_tokens": 1},
    "prefix": {"kind": "prefix_tuning", "virtual_tokens": 4},
}


def plan_of(model: dict[str, Any], method: Any, **parallel: Any) -> Any:
    recipe = Recipe.model_validate(
        {
            "name": "counted",
            "model": {"config": model},
            "method": method,
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "batch": {"length": sum(LENGTHS), "packs": 1, "micro": 1},
            "optimizer": {"learning_rate": 1e-3},
            "steps": 1,
            "precision": "fp32",
            "parallel": {"engine": "single", **parallel},
        }
    )
    return make_plan(recipe, DeviceRequest(), Hardware(2, ()), None)


def counted(model: dict[str, Any], method: Any, **parallel: Any) -> tuple[float, PassWork]:
    """Operations of linear layers and attention that torch sees, and what is planned."""
    plan = plan_of(model, method, **parallel)
    packs = PackFigures.of_store(
        sum(LENGTHS),
        np.array([[sum(LENGTHS)], [sum(LENGTHS) - len(LENGTHS)], [sum(length**2 for length in LENGTHS)]]),
    )
    shape = read_shape(model) or measure_shape(json.dumps(model))
    work = pass_work(plan, shape, packs)
    config = AutoConfig.for_model(**model)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention("sdpa"))
    # One product a token and expert, where torch can count it.
    base.set_experts_implementation("eager")
    trained: nn.Module = attach(base, plan.recipe.method, Start(seed=1))
    install_loss_head(trained)
    apply_checkpointing(trained, plan.recipe.parallel)
    trained.train()
    rows = [np.arange(length) % 64 for length in LENGTHS]
    micro_batch = lay_out(rows, [np.ones(length, np.uint8) for length in LENGTHS])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {flash: _flash, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        micro_batch_loss(trained, micro_batch, torch.device("cpu")).backward()
    return counter.get_total_flops(), work


def _flash(query: Any, key: Any, *_: Any, **__: Any) -> float:
    rows, heads, length, width = query
    # Half of the square, and all virtual tokens in front of the document.
    return 4 * rows * heads * width * (length**2 / 2 + length * (key[2] - length))


def _flash_backward(gradient: Any, query: Any, key: Any, *_: Any, **__: Any) -> float:
    return 2.5 * _flash(query, key)


@pytest.mark.parametrize(
    "checkpointing", [False, True, 2, "selective"], ids=["kept", "recomputed", "every second", "selective"]
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_planned_operations_are_those_that_run(method: Any, checkpointing: bool | int | str) -> None:
    seen, work = counted(MODELS["llama"], method, checkpointing=checkpointing)
    assert without_head(work) == pytest.approx(seen, rel=1e-9)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "llama"])
def test_other_families_too(model: str, method: str) -> None:
    seen, work = counted(MODELS[model], METHODS[method], checkpointing=2)
    assert without_head(work) == pytest.approx(seen, rel=1e-9)


def without_head(work: PassWork) -> float:
    """The chunked loss is one operator to torch, which it does not count."""
    (head,) = (products for products in work.products if products.part == "head")
    return work.hardware_flops - head.model_flops - head.one * head.recomputed


def test_the_head_runs_at_supervised_positions_only() -> None:
    model = {**SMALL, "model_type": "llama", "vocab_size": 1000}
    shape = read_shape(model)
    assert shape is not None
    packs = PackFigures.of_store(100, np.array([[100], [30], [10_000]]))
    heads = [pass_work(plan_of(model, method), shape, packs).products[-1] for method in ("full", "lora")]
    forward = 2 * 30 * 32 * 1000
    assert [head.model_flops for head in heads] == [3 * forward, 2 * forward]
    assert heads[0].recomputed == 0  # fp32: gradients are made in the forward pass


def test_a_token_costs_what_the_closed_formula_says() -> None:
    """6 (N - E) + 6 L h S of full fine-tuning, 4 (N - E) + 6 L h S of LoRA: the limits of an 8B on an H100."""
    shape = read_shape(published()["meta-llama/Llama-3.1-8B"])
    assert shape is not None
    length = 4096
    packs = PackFigures.full(length)
    model = dict(published()["meta-llama/Llama-3.1-8B"])
    per_token = {
        name: pass_work(plan_of(model, method), shape, packs).model_flops / length
        for name, method in (("full", "full"), ("lora", {"kind": "lora", "rank": 1}))
    }
    assert 989.4e12 / per_token["full"] == pytest.approx(20_500, rel=0.01)
    assert 989.4e12 / per_token["lora"] == pytest.approx(29_800, rel=0.01)


@pytest.mark.parametrize("window", [None, 8, 64, 200], ids=str)
def test_pairs_of_equal_documents_are_exact(window: int | None) -> None:
    """Against a sum over every query, but for the half pair of each row that the closed formula leaves out."""
    length, documents = 64, 3
    by_hand = documents * sum(min(at + 1, window or length) for at in range(length))
    packs = PackFigures.of_store(192, np.array([[192], [189], [documents * length**2]]))
    assert pairs_of_pack(packs, window) == pytest.approx(by_hand - documents * min(window or length, length) / 2)


def test_windows_are_read_as_transformers_reads_them() -> None:
    for configuration in (
        {"model_type": "gemma3_text", **SMALL, "num_hidden_layers": 8, "sliding_window": 16},
        {"model_type": "mistral", **SMALL},
        {"model_type": "mistral", **SMALL, "sliding_window": None},
        {"model_type": "qwen2", **SMALL, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        {"model_type": "qwen3", **SMALL, "sliding_window": 16},
        {"model_type": "phi3", **SMALL, "sliding_window": 16, "pad_token_id": 0},
    ):
        shape = read_shape(configuration)
        config = AutoConfig.for_model(**configuration)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        assert shape is not None
        assert shape.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
