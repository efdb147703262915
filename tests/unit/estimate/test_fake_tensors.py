"""Figures of models whose family is not described, compared with described families and with the real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from transformers import AutoConfig

from measured_memory import Figures, figures_of, measured, plan_of, predicted_of, save_model
from packhorse.errors import UserError
from packhorse.estimate.activations import count_activations
from packhorse.estimate.flops import pass_work
from packhorse.estimate.measure.fake_tensors import measure_shape
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.weights import list_weights
from packhorse.model_spec.parameters import Shape, read_shape
from packhorse.model_spec.trainable import count_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.methods import FullMethod, LoraMethod
from packhorse.recipe.schema import Recipe
from packhorse.workflows.model_shape import known_shape

# Of peft, bitsandbytes and DeepSpeed, about names that torch has changed.
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {},  # its own linear layers, learned positions, dropout everywhere
    "gpt_neox": {},  # attention and MLP side by side, one layer for queries, keys and values
    "olmo2": {},  # norms behind attention and MLP
    "starcoder2": {},  # LayerNorm, biases, no gate
    "cohere2": {},  # tied, scaled, one norm for both
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 96},
    "deepseek_v3": {  # latent attention, a first layer without experts, experts in groups
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 48,
        "num_key_value_heads": 4,
    },
}
RUNS: list[tuple[str, str, bool]] = [("full", "fp32", False), ("full", "bf16", True), ("lora", "bf16", False)]
ATTENTION = {  # of a mixture of experts, LoRA takes the attention's layers alone
    "qwen2_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"],
}


def configuration(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Without what the family's configuration does not have."""
    known = AutoConfig.for_model(kind)
    return {"model_type": kind, **{name: value for name, value in {**SMALL, **fields}.items() if hasattr(known, name)}}


def built(fields: dict[str, Any]) -> Shape:
    return measure_shape(json.dumps(fields))


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("method", "precision", "checkpointing"), RUNS, ids=str)
@pytest.mark.parametrize("kind", OTHERS)
def test_each_part_is_what_the_real_model_holds(
    kind: str, method: str, precision: str, checkpointing: bool, tmp_path: Path
) -> None:
    save_model(tmp_path, configuration(kind, OTHERS[kind]))
    chosen = {"kind": "lora", "target": ATTENTION.get(kind, "all-linear")} if method == "lora" else method
    parallel = {"checkpointing": checkpointing}
    plan = plan_of(tmp_path, (100, 100), method=chosen, precision=precision, parallel=parallel)
    found, planned = measured(plan, (100, 100)), predicted(plan, tmp_path)
    for part, size in found.items():
        assert planned[part] == pytest.approx(size, rel=0.01), part


def predicted(plan: RunPlan, folder: Path) -> Figures:
    shape = built(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return predicted_of(plan, shape, figures_of((100, 100)))


DESCRIBED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"num_local_experts": 8},
    "phi3": {},
    "gemma3_text": {"head_dim": 16},
}
CONFIGURATIONS: dict[str, tuple[Any, str, Any, str]] = {
    "full, one GPU": ("full", "single", False, "bf16"),
    "full, ddp, recomputed": ("full", "ddp", True, "bf16"),
    "full, zero2": ("full", "zero2", 2, "bf16"),
    "full, fp32": ("full", "fsdp2", False, "fp32"),
    "partial": ({"kind": "partial", "last_layers": 1}, "fsdp2", False, "bf16"),
    "partial, recomputed": ({"kind": "partial", "last_layers": 1}, "fsdp2", True, "bf16"),
    "lora, ddp": ("lora", "ddp", False, "bf16"),
    "lora, zero3": ("lora", "zero3", False, "bf16"),
    "lora, fsdp2, recomputed": ("lora", "fsdp2", True, "bf16"),
    "lora, whole ends": ({"kind": "lora", "train_also": ["lm_head", "embed_tokens"]}, "ddp", False, "bf16"),
    "qlora, one GPU": ("qlora", "single", 2, "bf16"),
    "qlora, zero3": ("qlora", "zero3", False, "bf16"),
    "dora": ({"kind": "lora", "dora": True, "dropout": 0.0}, "ddp", False, "bf16"),
    "prompt": ("prompt_tuning", "ddp", False, "bf16"),
}


@pytest.mark.parametrize("configuration_name", CONFIGURATIONS)
@pytest.mark.parametrize("kind", DESCRIBED)
def test_a_described_family_and_its_measurement_agree(kind: str, configuration_name: str) -> None:
    """On GPUs too, whose kernels cannot run here: described families count them operation by operation."""
    fields = configuration(kind, {**DESCRIBED[kind], "tie_word_embeddings": False, "sliding_window": None})
    method, engine, checkpointing, precision = CONFIGURATIONS[configuration_name]
    plan = gpu_plan(fields, method, engine, checkpointing, precision)
    shape = read_shape(fields)
    assert shape is not None
    one, other = (figures(plan, each) for each in (shape, built(fields)))
    assert other == pytest.approx(one, rel=0.002)


def gpu_plan(fields: dict[str, Any], method: Any, engine: str, checkpointing: Any, precision: str) -> RunPlan:
    parallel = {"engine": engine, "checkpointing": checkpointing}
    recipe = recipe_of(fields, method, precision=precision, parallel=parallel)
    return make_plan(recipe, DeviceRequest(1 if engine == "single" else 8), Hardware(2, ("NVIDIA H100",) * 8), None)


def figures(plan: RunPlan, shape: Shape) -> dict[str, float]:
    packs = PackFigures.full(512)
    held, work = list_weights(plan, shape), pass_work(plan, shape, packs)
    assert held is not None
    kept = count_activations(plan, shape, held, packs)
    return {
        "weights": sum(each.size for each in held),
        "trained": sum(each.size for each in held if each.trained),
        "kept": kept.kept,
        "recomputed": kept.recomputed,
        "model flops": work.model_flops,
        "hardware flops": work.hardware_flops,
    }


# Totals of the models' cards and papers: Pythia (arXiv 2304.01373), OLMo 2 (arXiv 2501.00656), GPT-2's own file.
@pytest.mark.parametrize(
    ("fields", "total"),
    [
        ({"model_type": "gpt2"}, 124_439_808),
        (
            {
                "model_type": "gpt_neox",
                "vocab_size": 50432,
                "hidden_size": 4096,
                "intermediate_size": 16384,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
            },
            6_857_302_016,
        ),
        ({"model_type": "olmo2", "vocab_size": 100352}, 7_298_617_344),
    ],
    ids=["gpt2", "pythia-6.9b", "olmo2-7b"],
)
def test_a_published_total(fields: dict[str, Any], total: int) -> None:
    counts = count_shape(built(fields), FullMethod())
    assert counts is not None
    assert counts.base == counts.trainable == total
    assert sum(module.total for module in counts.modules) == total


def test_all_experts_are_in_memory_and_active_ones_in_flops() -> None:
    fields = configuration("qwen2_moe", OTHERS["qwen2_moe"])
    more = {**fields, "num_experts_per_tok": 2 * fields.get("num_experts_per_tok", 4)}
    packs = PackFigures.full(512)
    plan = gpu_plan(fields, "full", "single", False, "bf16")
    few, many = (pass_work(plan, built(each), packs) for each in (fields, more))
    of_experts = [sum(each.model_flops for each in work.products if each.part == "experts") for work in (few, many)]
    assert of_experts[1] == 2 * of_experts[0] > 0
    assert count_shape(built(fields), FullMethod()) == count_shape(built(more), FullMethod())


def test_what_training_refuses_is_refused_before_it() -> None:
    with pytest.raises(UserError, match="does not hand keywords down"):
        built(configuration("stablelm", {}))
    with pytest.raises(UserError, match="mixture of experts"):
        known_shape(recipe_of(configuration("deepseek_v3", OTHERS["deepseek_v3"]), "lora"), None)
    with pytest.raises(UserError, match="no layer of a bloom model runs its attention through transformers' interface"):
        known_shape(recipe_of(configuration("bloom", {}), "full"), None)
    with pytest.raises(UserError, match="model_type nonsense, and transformers .* has no causal language model"):
        known_shape(recipe_of({"model_type": "nonsense", "vocab_size": 64}, "full"), None)


def test_dropout_of_attention_is_refused_where_the_kernel_has_none() -> None:
    plan = gpu_plan(configuration("gpt2", {}), "full", "single", False, "bf16")
    shape = built(configuration("gpt2", {}))
    held = list_weights(plan, shape)
    assert held is not None
    with pytest.raises(UserError, match="attention_dropout is 0.1"):
        count_activations(plan, shape, held, PackFigures.full(512))


def recipe_of(fields: dict[str, Any], method: Any, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"config": fields},
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "method": method,
            "optimizer": {"learning_rate": 1e-4},
            "steps": 2,
            "batch": {"length": 512, "packs": 8, "micro": 1},
            **sections,
        }
    )


def test_an_adapter_is_as_large_as_peft_makes_it() -> None:
    counts = count_shape(built({"model_type": "gpt2"}), LoraMethod(rank=8))
    assert counts is not None
    # Of each of 12 layers: attention in 768 x 2304 and out 768 x 768, MLP 768 x 3072 and back.
    assert counts.trainable == 12 * 8 * (768 + 2304 + 768 + 768 + 2 * (768 + 3072))
