"""Compiled layers: one graph for packs of any documents, the bits of eager layers, and the names of the checkpoint.

The backend `aot_eager` traces forward and backward pass like Inductor and runs torch's own kernels, so bits can be
compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from packhorse.model.attention import Documents, register_attention
from packhorse.model.methods.attach import Start, attach
from packhorse.model.units import layers_of
from packhorse.recipe.methods import FullMethod, LoraMethod, Method
from packhorse.recipe.schema import ParallelSection
from packhorse.run_folder.heartbeat import HeartbeatWriter
from packhorse.train import compilation
from packhorse.train.compilation import compile_layers, watch_compilation
from packhorse.train.objectives.token_loss import install_loss_head, loss_sum
from packhorse.train.setup import apply_checkpointing

WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# torch's compiler looks at `.grad` of a layer's input.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft reads it
]
LLAMA: dict[str, Any] = {"model_type": "llama", **WIDTHS}
# Windows of 8 in the first layer, none in the second: two kinds of layers.
GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    **WIDTHS,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
Pack = tuple[dict[str, Any], torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(compilation.CACHE_VARIABLE, "here")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# Of 48 tokens together in the first seven packs, of other sums in the rest.
DOCUMENTS = (
    *([24, 14, 10], [48], [10] * 4 + [8], [24, 24], [30, 10, 5, 3], [20, 28], [7, 30, 11]),
    *([24, 14], [36], [10] * 4, [24, 20], [30, 10, 5], [20, 18], [7, 30]),
)


def packs() -> list[Pack]:
    found = []
    for index, lengths in enumerate(DOCUMENTS):
        tokens = sum(lengths)
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 64, (1, tokens), generator=generator)
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
            "documents": Documents(tuple(lengths), ends, max(lengths)),
        }
        predicting = torch.arange(0, tokens - 1)
        found.append((inputs, predicting, ids[0, 1:]))
    return found


def trained(config: dict[str, Any], method: Method, recomputed: bool = False) -> tuple[PreTrainedModel, nn.Module]:
    """A base, and the same with its method, in float32 weights."""
    torch.manual_seed(0)
    attention = register_attention("sdpa")
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention)
    model = attach(base, method, Start(seed=1), autocast=True)
    install_loss_head(model)
    apply_checkpointing(model, ParallelSection(checkpointing=recomputed))
    return base, model.train()


def steps(model: nn.Module, made: list[Pack]) -> list[tuple[float, list[torch.Tensor]]]:
    """Loss and gradients of each pack, under bf16 autocast."""
    found = []
    for number, pack in enumerate(made):
        torch.manual_seed(number)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_sum(model, *pack)
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((loss.item(), gradients))
    return found


def compiled(base: PreTrainedModel) -> None:
    compile_layers([base.get_submodule(name) for name in layers_of(base)], Path("runs"), backend="aot_eager")


@pytest.mark.parametrize(
    ("config", "method", "recomputed"),
    [
        (LLAMA, FullMethod(), False),
        (LLAMA, LoraMethod(rank=4, dropout=0.0, target=["q_proj", "down_proj"]), True),
        (GEMMA, FullMethod(), True),
    ],
    ids=["full", "lora recomputed", "windows recomputed"],
)
def test_packs_of_any_documents_share_two_graphs_and_have_the_bits_of_eager_layers(
    config: dict[str, Any], method: Method, recomputed: bool
) -> None:
    made = packs()
    expected = steps(trained(config, method, recomputed)[1], made)
    base, model = trained(config, method, recomputed)
    names = list(model.state_dict())
    compiled(base)
    found = steps(model, made)
    assert 0 < counters["stats"]["unique_graphs"] <= 2
    assert sum(counters["graph_break"].values()) == 0
    assert list(model.state_dict()) == names
    for (loss, gradients), (eager_loss, eager_gradients) in zip(found, expected, strict=True):
        assert loss == eager_loss
        assert all(torch.equal(one, other) for one, other in zip(gradients, eager_gradients, strict=True))


def test_a_recomputed_layer_draws_the_same_dropout_again() -> None:
    """Else the gradient would be that of another function than the loss."""
    method, made = LoraMethod(rank=4, dropout=0.5, target=["down_proj"]), packs()[:1]
    gradients = []
    for recomputed in (False, True):
        torch._dynamo.reset()
        base, model = trained({**LLAMA, "num_hidden_layers": 1}, method, recomputed)
        for parameter in model.parameters():  # B is zero at the start, and dropout then without effect
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        compiled(base)
        gradients.append(steps(model, made))
    for (loss, kept), (again, repeated) in zip(*gradients, strict=True):
        assert loss == again
        assert all(torch.equal(one, other) for one, other in zip(kept, repeated, strict=True))


def test_compiling_is_logged_and_does_not_count_as_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pulse = HeartbeatWriter(tmp_path, 0)
    extended: list[float] = []
    real: Callable[[float], None] = pulse.extend
    monkeypatch.setattr(pulse, "extend", lambda seconds: (extended.append(seconds), real(seconds)))
    remove = watch_compilation(pulse)
    base, model = trained(LLAMA, FullMethod())
    compiled(base)
    with caplog.at_level(logging.INFO):
        steps(model, packs()[:1])
    remove()
    pulse.close()
    assert extended
    assert extended == [compilation.COMPILE_SECONDS, 0.0] * (len(extended) // 2)
    assert "compiled a graph of the decoder layers in" in caplog.text


def test_a_phase_that_was_extended_is_renewed_at_each_beat(tmp_path: Path) -> None:
    pulse = HeartbeatWriter(tmp_path, 0)
    pulse.phase("forward", 3)
    old = replace(pulse.last, since=pulse.last.since - 1000)

    def beaten() -> float:
        pulse._write(old)
        pulse._renew()
        return float(json.loads((tmp_path / "heartbeat-0.json").read_bytes())["since"])

    assert beaten() == old.since
    pulse.extend(60)
    assert beaten() > old.since + 900
    pulse.extend(0)
    assert beaten() == old.since
    pulse.close()


def test_compiled_code_is_kept_beside_the_runs_unless_the_user_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    compile_layers([], tmp_path)
    assert os.environ[compilation.CACHE_VARIABLE] == "here"
    monkeypatch.delenv(compilation.CACHE_VARIABLE)
    compile_layers([], tmp_path)
    assert os.environ[compilation.CACHE_VARIABLE] == str(tmp_path / ".compiled")
