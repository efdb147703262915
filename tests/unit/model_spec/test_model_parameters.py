"""Counts made without torch against transformers and peft on the meta device, and against published totals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from packhorse.cli.show.parameters import parameter_lines
from packhorse.data.resolve import vocabulary_size
from packhorse.model.parameters import names_of_model
from packhorse.model_spec.configuration import find_configuration, published
from packhorse.model_spec.method_names import names_of_parameters
from packhorse.model_spec.parameters import FAMILIES, list_parameters, read_shape
from packhorse.model_spec.trainable import IA3_TARGETS, ParameterCounts, count_shape
from packhorse.quickstart.files import VOCABULARY_SIZE
from packhorse.recipe.load import load_recipe
from packhorse.recipe.methods import (
    FullMethod,
    Ia3Method,
    LoraMethod,
    Method,
    PartialMethod,
    PrefixTuningMethod,
    PromptTuningMethod,
    QloraMethod,
)

# Totals of the models' cards on the hub (safetensors: parameters) and of the papers; tied heads are counted once.
PUBLISHED = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-3-1b-pt": 999_885_952,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
}
UNIQUE = {str(sorted(fields.items())): name for name, fields in reversed(published().items())}
SMALL = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
MORE: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mixtral": {"num_local_experts": 3},
    "qwen3": {"head_dim": 10},
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 24, "head_dim": 10},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi3": {"pad_token_id": 0},
}
# Not `all-linear`: of a mixture of experts peft 0.21 takes that, and the old names, to mean experts and router.
LINEAR = r".*(q_proj|k_proj|v_proj|qkv_proj|o_proj|(?<!experts)\.(gate|up|gate_up|down)_proj)"
METHODS: dict[str, tuple[Any, Any]] = {
    "lora": (LoraMethod(rank=5), LoraConfig(task_type="CAUSAL_LM", r=5, target_modules=LINEAR)),
    "qlora, names": (
        QloraMethod(rank=3, target=["o_proj", "q_proj"]),
        LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["o_proj", "q_proj"]),
    ),
    "dora": (
        LoraMethod(rank=4, dora=True),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEAR, use_dora=True),
    ),
    "lora, whole modules": (
        LoraMethod(rank=2, target=["o_proj"], train_also=["embed_tokens", "norm"]),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"], modules_to_save=["embed_tokens", "norm"]),
    ),
    "ia3": (Ia3Method(), IA3Config(task_type="CAUSAL_LM")),
    "prompt tuning": (
        PromptTuningMethod(virtual_tokens=7),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    ),
    "prefix tuning": (
        PrefixTuningMethod(virtual_tokens=7),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    ),
}


def count_parameters(fields: Mapping[str, Any] | None, method: Method) -> ParameterCounts | None:
    shape = read_shape(fields)
    return None if shape is None else count_shape(shape, method)


def on_meta(fields: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        known = {name: value for name, value in fields.items() if name != "model_type"}
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields["model_type"], **known))
    return model


def small(family: str) -> dict[str, Any]:
    return {"model_type": family, **SMALL, **MORE.get(family, {})}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_names_known_without_a_model_are_those_of_its_modules(family: str, tied: bool) -> None:
    fields = {**small(family), "tie_word_embeddings": tied}
    shape = read_shape(fields)
    assert shape is not None
    known = names_of_parameters(family, list_parameters(shape), shape.names, shape.tied, shape.layers)
    loaded = names_of_model(on_meta(fields))
    assert set(known.linear) == set(loaded.linear)
    # Modules without parameters, such as activations, can neither be trained nor adapted.
    assert set(known.modules) <= set(loaded.modules)
    for name in ("family", "embedding", "head", "tied", "weights", "experts", "layers", "num_layers"):
        assert getattr(known, name) == getattr(loaded, name), name


def test_peft_names_targets_of_ia3_for_the_families_of_the_table_and_no_others() -> None:
    assert IA3_TARGETS.keys() == KNOWN.keys() & FAMILIES.keys()


def sizes(model: nn.Module) -> tuple[int, int]:
    every = list(model.parameters())
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)


@pytest.mark.parametrize("name", UNIQUE.values())
def test_a_published_model_has_these_parameters(name: str) -> None:
    shape = read_shape(published()[name])
    assert shape is not None
    listed = {parameter.name: parameter.shape for parameter in list_parameters(shape)}
    assert listed == {key: tuple(value.shape) for key, value in on_meta(published()[name]).named_parameters()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_total(name: str) -> None:
    counts = count_parameters(published()[name], FullMethod())
    assert counts is not None
    assert (counts.base, counts.trainable, counts.total) == (PUBLISHED[name],) * 3


@pytest.mark.parametrize(("name", "trained"), [("8B", 41_943_040), ("70B", 207_093_760)])
def test_a_published_number_of_adapter_weights(name: str, trained: int) -> None:
    counts = count_parameters(published()[f"meta-llama/Llama-3.1-{name}"], LoraMethod(rank=16))
    assert counts is not None
    assert counts.trainable == trained
    assert sum(module.trainable for module in counts.modules) == trained
    assert sum(module.total for module in counts.modules) == counts.base


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_model_of_each_family(family: str) -> None:
    shape = read_shape(small(family))
    assert shape is not None
    listed = list_parameters(shape)
    model = on_meta(small(family))
    assert {p.name: p.shape for p in listed} == {key: tuple(p.shape) for key, p in model.named_parameters()}
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert {parameter.name for parameter in listed if parameter.linear} == linear - {"lm_head.weight"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.filterwarnings("ignore")  # of peft, about tied weights and meta tensors
def test_trainable_weights_are_those_of_peft(family: str, method: str) -> None:
    ours, theirs = METHODS[method]
    counts = count_parameters(small(family), ours)
    if method == "ia3" and family in ("qwen3_moe", "phi3"):
        with pytest.raises(ValueError, match="target_modules"):
            get_peft_model(on_meta(small(family)), IA3Config(task_type="CAUSAL_LM"))
        assert counts is None
        return
    model = get_peft_model(on_meta(small(family)), theirs.__class__(**theirs.to_dict()))
    assert counts is not None
    assert (counts.trainable, counts.total) == sizes(model)
    assert sum(module.trainable for module in counts.modules) == counts.trainable


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_on_experts_are_those_of_peft(family: str) -> None:
    counts = count_parameters(small(family), LoraMethod(rank=3, dropout=0.0, experts=True))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    assert counts is not None
    assert (counts.trainable, counts.total) == sizes(get_peft_model(on_meta(small(family)), config))


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        (PartialMethod(last_layers=2), lambda name: ".layers.2." in name or ".layers.3." in name),
        (PartialMethod(last_layers=1, train=["lm_head.*"]), lambda name: ".layers.3." in name or "lm_head" in name),
        (PartialMethod(freeze=["*embed_tokens*"]), lambda name: "embed_tokens" not in name),
        (
            PartialMethod(train=["*.mlp.*"], freeze=["*.down_proj.*"]),
            lambda name: ".mlp." in name and "down" not in name,
        ),
    ],
    ids=["last layers", "last layers and head", "freeze alone", "train but freeze"],
)
def test_part_of_a_model(method: PartialMethod, trained: Any) -> None:
    counts = count_parameters(small("llama"), method)
    model = on_meta(small("llama"))
    assert counts is not None
    assert counts.trainable == sum(p.numel() for name, p in model.named_parameters() if trained(name))
    assert counts.total == counts.base


def test_what_is_not_known_is_not_counted() -> None:
    assert count_parameters({"model_type": "gpt2", "n_embd": 8}, FullMethod()) is None
    assert count_parameters({"model_type": "llama", "hidden_size": 8}, FullMethod()) is None
    assert count_parameters(None, FullMethod()) is None


def test_a_local_configuration_wins_over_the_shipped_table(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("llama3.1-8b/lora")
    assert find_configuration(recipe) == published()["meta-llama/Llama-3.1-8B-Instruct"]
    snapshot = tmp_path / "models--meta-llama--Llama-3.1-8B-Instruct"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("0" * 40)
    folder = snapshot / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 7}')
    monkeypatch.setattr("packhorse.model_spec.configuration.HUB_CACHE", str(tmp_path))
    assert find_configuration(recipe) == {"model_type": "llama", "hidden_size": 7}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "8,030,261,248"),
        (["model.id=nobody/nothing"], "run `hf download nobody/nothing config.json`"),
        (
            ["model.new_tokens=[<a>]"],
            "only the loaded model shows whether its embedding has free rows for model.new_tokens",
        ),
        (
            ["model.id=Qwen/Qwen3-30B-A3B", "method=ia3"],
            "peft chooses what ia3 trains of a qwen3_moe; set method.target to choose it",
        ),
    ],
    ids=["counted", "unknown model", "new tokens", "unknown choice"],
)
def test_the_lines_of_a_recipe(words: list[str], expected: str) -> None:
    lines = dict(parameter_lines(load_recipe("llama3.1-8b/lora", words), None))
    assert lines["parameters"].endswith(expected)
    assert ("trainable" in lines) == (not words)


@pytest.mark.parametrize("prepared", [4096, None])
def test_a_fresh_models_vocabulary_is_its_tokenizers(prepared: int | None) -> None:
    """Before the data is prepared, that of the tokenizer's own file."""
    recipe = load_recipe("quickstart/full")
    fields = {**(recipe.model.config or {}), "vocab_size": prepared or VOCABULARY_SIZE}
    expected = sum(parameter.numel() for parameter in on_meta(fields).parameters())
    assert dict(parameter_lines(recipe, prepared))["trainable"] == f"{expected:,} (100.00%)"


def test_a_fresh_model_without_a_tokenizer_at_hand_says_what_fetches_it(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart/full", ["model.tokenizer=nobody/nothing"])
    line = dict(parameter_lines(recipe, None))["parameters"]
    assert "nobody/nothing has no tokenizer.json" in line
    assert "packhorse prepare" in line
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    words.add_tokens(["<d>"])
    words.save(str(tmp_path / "tokenizer.json"))
    assert vocabulary_size(load_recipe("quickstart/full", [f"model.tokenizer={tmp_path}"])) == 4
