"""Methods that a model cannot take are refused by name; what partial trains and what counts say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel, Qwen2MoeConfig

from packhorse.errors import UserError
from packhorse.model.methods.attach import Start, attach
from packhorse.model.parameters import count_parameters, trained_kinds
from packhorse.recipe.methods import Ia3Method, LoraMethod, Method, PartialMethod

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(tied: bool = False) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    return model


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_last_layers_are_trained_and_what_patterns_add_but_not_what_they_freeze() -> None:
    model = llama()
    method = PartialMethod(last_layers=1, train=["lm_head.*", "*.0.mlp.*"], freeze=["*layernorm*"])
    attach(model, method, Start())
    layer = {name for name, _ in model.named_parameters() if ".layers.2." in name and "layernorm" not in name}
    mlp = {f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert trained_names(model) == layer | mlp | {"lm_head.weight"}


def test_freeze_alone_leaves_all_else_trained_and_tied_weights_go_together() -> None:
    model = llama(tied=True)
    every = trained_names(model)
    attach(model, PartialMethod(freeze=["*embed_tokens*", "lm_head.*", "model.norm.*"]), Start())
    assert trained_names(model) == every - {"model.embed_tokens.weight", "model.norm.weight"}


PARTIAL_MISTAKES = {
    "unknown": (PartialMethod(train=["*.mpl.*"]), r"method.train has \*.mpl.\*, which matches none of the model's 30"),
    "half-of-a-tie": (
        PartialMethod(freeze=["lm_head.*"]),
        "lm_head.weight, which is tied to model.embed_tokens.weight",
    ),
    "too-many-layers": (PartialMethod(last_layers=4), "method.last_layers is 4, and the model has 3 layers"),
    "all": (PartialMethod(train=["*"]), "leave all 29 weights to train"),
    "none": (PartialMethod(train=["*.mlp.*"], freeze=["*"]), "leave 0 of 29 weights to train"),
}


@pytest.mark.parametrize(("method", "message"), PARTIAL_MISTAKES.values(), ids=PARTIAL_MISTAKES)
def test_patterns_that_choose_wrongly_are_refused(method: PartialMethod, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach(llama(tied=True), method, Start())


ADAPTER_MISTAKES: dict[str, tuple[Method, bool, str]] = {
    "target-nowhere": (LoraMethod(target=["c_attn"]), False, "method.target has c_attn, which gets no"),
    "one-target-nowhere": (LoraMethod(target=["q_proj", "c_attn"]), False, "method.target has c_attn, which gets no"),
    "head": (LoraMethod(target=["lm_head"]), False, "method.target names lm_head, the output head"),
    "whole-module-nowhere": (LoraMethod(train_also=["lm_haed"]), False, "lm_haed, which is no module.*\n.*\n.*lm_head"),
    "half-of-a-tie": (LoraMethod(train_also=["lm_head"]), True, "train_also names lm_head, which this model ties to"),
    "no-experts": (LoraMethod(experts=True, dropout=0), False, "method.experts is true, and this model has no fused"),
    "ia3-nowhere": (Ia3Method(target=["k_proj", "w2"]), False, "method.target has w2, which is no linear module"),
}


@pytest.mark.parametrize(("method", "tied", "message"), ADAPTER_MISTAKES.values(), ids=ADAPTER_MISTAKES)
def test_adapters_that_the_model_has_no_place_for_are_refused(method: Method, tied: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach(llama(tied), method, Start())


def test_names_that_peft_would_take_for_fused_experts_are_refused_and_all_linear_means_no_expert() -> None:
    mixtral = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=2))
    adapted = attach(mixtral, LoraMethod(rank=2, dropout=0.1), Start())
    assert {kind.name.split(".")[0] for kind in trained_kinds(adapted)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    shared = AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(**SMALL, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    )
    with pytest.raises(UserError, match="covers down_proj, gate_proj, up_proj, and this model is a mixture of experts"):
        attach(shared, LoraMethod(), Start())


def test_ia3_asks_for_names_where_peft_knows_none() -> None:
    model = AutoModelForCausalLM.from_config(Qwen2MoeConfig(**SMALL, num_experts=2, moe_intermediate_size=8))
    with pytest.raises(UserError, match="peft names no targets of IA³ for a qwen2_moe model"):
        attach(model, Ia3Method(), Start())


def test_trained_parameters_are_counted_by_kind_of_module() -> None:
    model = attach(llama(), LoraMethod(rank=4, target=["q_proj", "k_proj"], train_also=["lm_head"]), Start())
    assert [str(kind) for kind in trained_kinds(model)] == [
        "q_proj.lora_A: 3 modules, 192",
        "q_proj.lora_B: 3 modules, 192",
        "k_proj.lora_A: 3 modules, 192",
        "k_proj.lora_B: 3 modules, 96",
        "lm_head: 1 modules, 512",
    ]
    assert count_parameters(model).trainable == 192 * 3 + 96 + 512


def test_a_model_on_the_meta_device_takes_plain_adapters_there() -> None:
    with torch.device("meta"):
        model = llama()
    for method in (LoraMethod(), LoraMethod(initialization="orthogonal"), PartialMethod(last_layers=1)):
        with torch.device("meta"):
            model = llama()
        adapted = attach(model, method, Start())
        assert all(parameter.is_meta for parameter in adapted.parameters())


def test_a_whole_model_needs_no_peft(tmp_path: Path) -> None:
    code = (
        "import sys; import packhorse.train.worker, packhorse.evaluate.compare;"
        "from packhorse.model.methods.attach import Start, attach;"
        "from packhorse.recipe.methods import FullMethod, PartialMethod;"
        "from transformers import LlamaConfig, LlamaForCausalLM;"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2,"
        "    num_attention_heads=1));"
        "[attach(model, method, Start()) for method in (FullMethod(), PartialMethod(last_layers=1))];"
        "sys.exit('peft' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
