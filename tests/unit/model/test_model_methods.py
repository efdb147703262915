"""Every method: trained on packed rows, saved, and opened again by peft or transformers on documents one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from packhorse.data.packs.loader import lay_out
from packhorse.errors import UserError
from packhorse.evaluate.generate import greedy, stream
from packhorse.model.attention import register_attention
from packhorse.model.load import ModelRequest, Quantization, load_model
from packhorse.model.methods.adapter_files import load_adapter, with_adapter
from packhorse.model.methods.attach import Start, attach
from packhorse.recipe.methods import (
    Ia3Method,
    LoraMethod,
    Method,
    PrefixTuningMethod,
    PromptTuningMethod,
    QloraMethod,
)
from packhorse.train.checkpoint.weights import adapter_files_writer
from packhorse.train.objectives.forward import micro_batch_loss
from packhorse.train.objectives.token_loss import install_loss_head

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it

VOCABULARY = 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
}
NEW_TOKENS = {VOCABULARY: (3, 5), VOCABULARY + 1: (7,)}
DOCUMENTS = [np.random.default_rng(length).integers(0, VOCABULARY, length).astype(np.int64) for length in (5, 9, 2, 13)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, config in CONFIGS.items():
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # as after training: singular values differ, outputs are no noise
            if parameter.dim() > 1:
                parameter.data.mul_(4)
        model.save_pretrained(folder / name)
    return folder


def request(folder: Path, attention: str, **more: Any) -> ModelRequest:
    fields = {"revision": None, "config": None, "seed": 0, "dtype": torch.float32, "quantization": None}
    return ModelRequest(
        source=str(folder), attention=attention, trust_remote_code=False, device=CPU, **{**fields, **more}
    )  # fmt: skip


def training_model(folder: Path, method: Method, resumed: bool = False, **more: Any) -> nn.Module:
    base = load_model(request(folder, register_attention("sdpa"), **more), VOCABULARY + len(more.get("new_tokens", ())))
    start = Start(seed=1, source=folder, new_token_ids=tuple(more.get("new_tokens", ())), resumed=resumed)
    model = attach(base, method, start)
    install_loss_head(model)
    return model.train()


def test_lora_without_peft_cast_gives_the_same_bits_under_autocast(bases: Path) -> None:
    found = []
    for autocast in (False, True):
        base = load_model(request(bases / "llama", register_attention("sdpa"), dtype=torch.bfloat16), VOCABULARY)
        model = attach(base, LoraMethod(rank=4, dropout=0.0), Start(seed=1), autocast)
        install_loss_head(model)
        seen: list[torch.dtype] = []
        layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
        layer.lora_A["default"].register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0].dtype))
        optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                packed_loss(model, documents(())).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((seen, [p.detach() for p in model.parameters() if p.requires_grad]))
    (cast, expected), (kept, weights) = found
    assert (set(cast), set(kept)) == ({torch.float32}, {torch.bfloat16})
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights, expected, strict=True))


def documents(new_tokens: Sequence[int]) -> list[Any]:
    found = [document.copy() for document in DOCUMENTS]
    for number, token in enumerate(new_tokens):
        found[number][2] = token
    return found


def packed_loss(model: nn.Module, rows: list[Any]) -> Tensor:
    return micro_batch_loss(model, lay_out(rows, [np.ones(len(row), np.uint8) for row in rows]), CPU)


def loss_alone(model: nn.Module, rows: list[Any]) -> float:
    """Each document by itself through the model's own forward and logits."""
    total = 0.0
    for row in rows:
        ids = torch.from_numpy(row)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(row) : -1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return total


def train(model: nn.Module, rows: list[Any], steps: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        packed_loss(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


PLAIN = {"rank": 4, "dropout": 0.0}
ADAPTERS: dict[str, tuple[str, Method, bool]] = {
    "lora": ("llama", LoraMethod(**PLAIN), False),
    "rank-stabilised-gaussian": ("llama", LoraMethod(**PLAIN, rank_stabilized=True, initialization="gaussian"), False),
    "dora": ("llama", LoraMethod(**PLAIN, dora=True), False),
    "orthogonal": ("llama", LoraMethod(**PLAIN, initialization="orthogonal"), False),
    "pissa": ("llama", LoraMethod(**PLAIN, initialization="pissa"), False),
    "pissa-dora": ("llama", LoraMethod(**PLAIN, initialization="pissa", dora=True), False),
    "pissa-rank-stabilised": ("llama", LoraMethod(**PLAIN, initialization="pissa", rank_stabilized=True), False),
    "olora": ("tied", LoraMethod(**PLAIN, initialization="olora"), False),
    "head-trained-too": ("llama", LoraMethod(**PLAIN, train_also=["lm_head", "norm"]), False),
    "tied-ends-trained-too": ("tied", LoraMethod(**PLAIN, train_also=["lm_head", "embed_tokens"]), False),
    "experts": ("mixtral", LoraMethod(**PLAIN, experts=True), False),
    "new-tokens": ("llama", LoraMethod(**PLAIN), True),
    "new-tokens-tied": ("tied", LoraMethod(**PLAIN), True),
    "pissa-new-tokens": ("llama", LoraMethod(**PLAIN, initialization="pissa", train_also=["norm"]), True),
    "ia3": ("llama", Ia3Method(), False),
    "ia3-named": ("mixtral", Ia3Method(target=["k_proj", "o_proj"], feedforward=["o_proj"]), False),
    "prompt": ("llama", PromptTuningMethod(virtual_tokens=3), False),
    "prefix": ("tied", PrefixTuningMethod(virtual_tokens=3), False),
}  # fmt: skip


@pytest.mark.parametrize(("base", "method", "grown"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_opened_by_peft_on_the_base_has_trainings_loss(
    base: str, method: Method, grown: bool, bases: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"new_tokens": NEW_TOKENS} if grown else {}
    rows = documents(tuple(more.get("new_tokens", ())))
    model = training_model(bases / base, method, **more)
    before = packed_loss(model, rows).item()
    start = trained(model)
    train(model, rows, 3)
    after = packed_loss(model, rows).item()
    assert after < before - 1e-3
    moved = {name for name, value in trained(model).items() if not torch.equal(value, start[name])}
    assert moved == start.keys()

    adapter_files_writer(model, trained(model), is_result=True)(tmp_path)
    original = load_model(request(bases / base, "eager", **more), VOCABULARY + len(more.get("new_tokens", ())))
    reopened = PeftModel.from_pretrained(original, tmp_path)
    assert loss_alone(reopened, rows) == pytest.approx(after, rel=2e-6)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(value.numel() > 0 and value.isfinite().all() for value in stored.values())


QUANTIZED = {
    "nf4": QloraMethod(**PLAIN),
    "fp4": QloraMethod(**PLAIN, quantization="fp4", double_quantization=False),
    "int8": QloraMethod(**PLAIN, quantization="int8"),
    "nf4-dora": QloraMethod(**PLAIN, dora=True),
}


@pytest.mark.parametrize("method", QUANTIZED.values(), ids=QUANTIZED)
def test_a_quantised_base_is_the_same_bit_for_bit_after_training_and_carries_the_saved_adapter(
    method: QloraMethod, bases: Path, tmp_path: Path
) -> None:
    quantization = Quantization(method.quantization, method.double_quantization, torch.float32)
    model = training_model(bases / "llama", method, quantization=quantization)
    stored = {name: value.clone() for name, value in model.state_dict().items() if ".lora_" not in name}
    assert {torch.uint8, torch.int8} & {value.dtype for value in stored.values()}
    before = packed_loss(model, DOCUMENTS).item()
    train(model, DOCUMENTS, 3)
    after = packed_loss(model, DOCUMENTS).item()
    assert after < before - 1e-3
    for name, value in model.state_dict().items():
        if ".lora_" not in name:
            # 4-bit bytes are stored as floats, many of which are NaN.
            assert torch.equal(value.view(torch.uint8), stored[name].view(torch.uint8)), name

    adapter_files_writer(model, trained(model), is_result=True)(tmp_path)
    original = load_model(request(bases / "llama", "eager", quantization=quantization), VOCABULARY)
    reopened = PeftModel.from_pretrained(original, tmp_path)
    assert loss_alone(reopened, DOCUMENTS) == pytest.approx(after, rel=2e-6)


@pytest.mark.parametrize(("base", "method", "grown"), ADAPTERS.values(), ids=ADAPTERS)
def test_a_resumed_adapter_is_the_same_model_and_steps_on_alike(
    base: str, method: Method, grown: bool, bases: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"new_tokens": NEW_TOKENS} if grown else {}
    rows = documents(tuple(more.get("new_tokens", ())))
    model = training_model(bases / base, method, **more)
    train(model, rows, 2)
    adapter_files_writer(model, trained(model))(tmp_path)
    resumed = training_model(bases / base, method, resumed=True, **more)
    load_adapter(resumed, tmp_path)
    for each in (model, resumed):
        train(each, rows, 2)
    expected = trained(model)
    found = trained(resumed)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_an_adapter_of_another_method_is_not_resumed_from(bases: Path, tmp_path: Path) -> None:
    model = training_model(bases / "llama", LoraMethod(**PLAIN))
    adapter_files_writer(model, trained(model))(tmp_path)
    other = training_model(bases / "llama", LoraMethod(**PLAIN, target=["q_proj"]))
    with pytest.raises(UserError, match="holds 28 tensors, and the method trains 4"):
        load_adapter(other, tmp_path)


def test_every_rank_draws_the_same_adapters_in_any_order(bases: Path) -> None:
    method = LoraMethod(**PLAIN)
    torch.manual_seed(5)
    one = trained(training_model(bases / "llama", method))
    torch.manual_seed(6)
    other = trained(training_model(bases / "llama", LoraMethod(**PLAIN, target=["v_proj"])))
    assert other
    for name, value in other.items():
        assert torch.equal(value, one[name])


@pytest.mark.parametrize(
    "method", [PromptTuningMethod(virtual_tokens=3), PrefixTuningMethod(virtual_tokens=3)], ids=["prompt", "prefix"]
)
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # peft on its own generate
def test_answers_of_a_prompt_tuned_model_are_those_of_pefts_generate(
    method: Method, bases: Path, tmp_path: Path
) -> None:
    model = training_model(bases / "llama", method)
    train(model, DOCUMENTS, 3)
    adapter_files_writer(model, trained(model))(tmp_path)
    served = with_adapter(load_model(request(bases / "llama", "sdpa"), VOCABULARY), tmp_path).eval()
    prompts = [document[:4].tolist() for document in DOCUMENTS[:2]] + [DOCUMENTS[3].tolist()]
    found = greedy(served, prompts, [6] * 3, frozenset({VOCABULARY + 1}))
    theirs = PeftModel.from_pretrained(load_model(request(bases / "llama", "sdpa"), VOCABULARY), tmp_path).eval()
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        limits = {"max_new_tokens": 6, "eos_token_id": VOCABULARY + 1, "pad_token_id": 0}
        expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
        assert answer == expected[0, -6:].tolist()
        assert list(stream(served, prompt, 6, frozenset())) == answer
    with torch.no_grad():
        logits = served(input_ids=torch.tensor([prompts[2]]), use_cache=False).logits
        base = load_model(request(bases / "llama", "sdpa"), VOCABULARY)(input_ids=torch.tensor([prompts[2]])).logits
        with served.disable_adapter():
            without = served(input_ids=torch.tensor([prompts[2]]), use_cache=False).logits
    assert logits.shape == base.shape == (1, len(prompts[2]), VOCABULARY)
    assert not torch.allclose(logits, base, atol=1e-3)
    torch.testing.assert_close(without, base)
