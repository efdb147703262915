"""Which attention kernel and precision run on which GPU, by the documented limits of torch's FlashAttention-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from packhorse.errors import UserError
from packhorse.estimate.gpus import find_gpu
from packhorse.model_spec.configuration import published
from packhorse.model_spec.parameters import FAMILIES
from packhorse.plan.gpu_support import kernels_table
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from tiny import TINY

LAPTOP = Hardware(num_cores=2, gpus=())
PAGE = Path(__file__).parents[3] / "docs" / "families.md"
# https://developer.nvidia.com/cuda-gpus; flash_api.cpp, mha_varlen_fwd: "Ampere GPUs or newer", at most 256.
CAPABILITY = {"V100": 7.0, "T4": 7.5, "A100": 8.0, "L40S": 8.9, "4090": 8.9, "H100": 9.0, "H200": 9.0}
CAPABILITY |= {"B200": 10.0, "5090": 12.0, "3090": 8.6, "A10": 8.6, "L4": 8.9}
CONFIGS: dict[str, Any] = {**published()}
for _kind in (*FAMILIES, "deepseek_v3", "gpt_neox"):
    CONFIGS[f"default {_kind}"] = {"model_type": _kind, **CONFIG_MAPPING[_kind]().to_dict()}


def plan(config: Any, gpu: str | None, precision: str, attention: str = "auto") -> Any:
    model = {"config": dict(config), "tokenizer": "builtin:tokenizer", "attention": attention}
    recipe = Recipe.model_validate(TINY | {"model": model, "precision": precision})
    ask = DeviceRequest() if gpu is None else DeviceRequest(1, capability=find_gpu(gpu).compute_capability)
    return make_plan(recipe, ask, LAPTOP, None)


@pytest.mark.parametrize("gpu", CAPABILITY)
def test_each_model_gets_a_kernel_that_takes_its_heads_on_this_gpu(gpu: str) -> None:
    assert find_gpu(gpu).compute_capability == CAPABILITY[gpu]
    precision = "bf16" if CAPABILITY[gpu] >= 8 else "fp16"
    for name, config in CONFIGS.items():
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        if config["model_type"] == "deepseek_v3":
            width = 128 + 64  # qk_nope_head_dim + qk_rope_head_dim (arXiv 2412.19437, section 4.2)
        expected = "varlen" if CAPABILITY[gpu] >= 8 and width <= 256 else "sdpa"
        assert plan(config, gpu, precision).chosen("model.attention") == expected, name


def test_on_a_cpu_and_in_float32_attention_is_sdpa() -> None:
    llama = published()["meta-llama/Llama-3.1-8B"]
    assert plan(llama, None, "bf16").chosen("model.attention") == "sdpa"
    assert plan(llama, "H100", "fp32").chosen("model.attention") == "sdpa"


def test_gpus_before_ampere_are_refused_what_they_do_not_have() -> None:
    llama = published()["meta-llama/Llama-3.1-8B"]
    with pytest.raises(UserError, match=r"precision is bf16, and the GPU has compute capability 7\.5"):
        plan(llama, "T4", "bf16")
    with pytest.raises(UserError, match=r"model\.attention is varlen, and the GPU has compute capability 7\.0"):
        plan(llama, "V100", "fp16", "varlen")


def test_the_reason_names_kernel_and_precision_of_new_gpus() -> None:
    for gpu in ("B200", "H200", "5090"):
        chosen = plan(published()["Qwen/Qwen3-8B"], gpu, "bf16").decisions
        (reason,) = (each.reason for each in chosen if each.name == "model.attention")
        assert f"compute capability {CAPABILITY[gpu]}, bf16" in reason


def test_selective_checkpointing_is_refused_where_deepspeed_gathers_weights() -> None:
    recipe = Recipe.model_validate(TINY | {"parallel": {"engine": "zero3", "checkpointing": "selective"}})
    with pytest.raises(UserError, match=r"checkpointing is selective, and parallel\.engine is zero3"):
        make_plan(recipe, DeviceRequest(8), LAPTOP, None)


def test_the_table_of_the_documentation_is_this() -> None:
    assert kernels_table() in PAGE.read_text(encoding="utf-8")
