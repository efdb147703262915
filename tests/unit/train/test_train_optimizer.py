"""Each optimizer against torch's or bitsandbytes' own class used by hand, LoRA+ against peft's groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.recipe.schema import ParallelSection, Recipe
from packhorse.train.engine.joint_optimizer import InBackwardOptimizer
from packhorse.train.engine.optimizer import make_optimizer, set_learning_rate
from packhorse.train.setup import apply_checkpointing

BASE: dict[str, Any] = {"name": "r", "model": {"id": "o/m"}, "data": {"sources": [{"path": "r.jsonl"}]}, "epochs": 1}
RATE, DECAY, BETAS = 1e-3, 0.1, (0.8, 0.95)


def recipe(method: Any = "full", **optimizer: Any) -> Recipe:
    fields = {"learning_rate": RATE, "weight_decay": DECAY, "betas": list(BETAS), **optimizer}
    return Recipe.model_validate({**BASE, "method": method, "optimizer": fields})


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=80,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(80, (2, 12), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_hand(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The same, as its authors' documentation has it."""
    weights = dict(model.named_parameters())
    groups = [
        {"params": [p for p in weights.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in weights.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if name == "muon":
        hidden = [key for key, p in weights.items() if ".layers." in key and p.dim() == 2]
        others = [key for key in weights if key not in hidden]
        rest = [
            {"params": [weights[k] for k in others if weights[k].dim() > 1], "weight_decay": DECAY},
            {"params": [weights[k] for k in others if weights[k].dim() == 1], "weight_decay": 0.0},
        ]
        muon = torch.optim.Muon(
            [weights[k] for k in hidden],
            lr=RATE,
            weight_decay=DECAY,
            momentum=0.9,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        )
        return [muon, torch.optim.AdamW(rest, lr=RATE, betas=BETAS, fused=True)]
    if name == "adamw":
        return [torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=1e-6, fused=True)]
    if name == "adafactor":
        return [torch.optim.Adafactor(groups, lr=RATE)]
    import bitsandbytes

    classes = {"adamw_8bit": "AdamW8bit", "lion": "Lion", "lion_8bit": "Lion8bit"}
    return [getattr(bitsandbytes.optim, classes[name])(groups, lr=RATE, betas=BETAS)]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "adamw_8bit", "lion", "lion_8bit"])
def test_steps_are_those_of_the_library(name: str) -> None:
    model = tiny_llama()
    start, theirs = copy.deepcopy(model), copy.deepcopy(model)
    more: dict[str, Any] = {"adamw": {"epsilon": 1e-6}, "muon": {"momentum": 0.9}}.get(name, {})
    train(model, make_optimizer(model, recipe(name=name, **more)))
    optimizers = by_hand(name, theirs)
    joint = optimizers[0]
    if len(optimizers) == 2:
        joint.register_step_post_hook(lambda *_: optimizers[1].step())
        optimizers[1].register_step_post_hook(lambda *_: optimizers[1].zero_grad())
    train(theirs, joint)
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[key]), key
        assert not torch.equal(weight, start.state_dict()[key]), key


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_muon_takes_the_matrices_of_the_layers_alone(tied: bool) -> None:
    model = tiny_llama(tied)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, recipe(name="muon"))
    train(model, optimizer, steps=1)
    moved_by_muon = {names[id(p)] for p, state in optimizer.state.items() if "momentum_buffer" in state}
    assert moved_by_muon == {
        f"model.layers.{layer}.{module}_proj.weight"
        for layer in range(2)
        for module in ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    }
    assert len(optimizer.state) == len(names)


def test_norms_and_biases_do_not_decay_and_frozen_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    model[2].weight.requires_grad_(False)
    optimizer = make_optimizer(model, recipe())
    by_decay = {group["weight_decay"]: [tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups}
    assert by_decay == {0.1: [(3, 2)], 0.0: [(3,), (3,), (3,), (1,)]}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers by it
def test_lora_plus_has_the_groups_of_peft() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
        return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16.0)
    ours = make_optimizer(model, recipe({"kind": "lora", "learning_rate_ratio": 16.0}))
    assert rates(ours) == rates(theirs)
    assert set(rates(ours).values()) == {RATE, RATE * 16}
    set_learning_rate(ours, RATE / 10)
    assert rates(ours) == pytest.approx({name: rate / 10 for name, rate in rates(theirs).items()})


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_joint_optimizer_goes_on_from_its_state(name: str) -> None:
    """As accelerate does at its start, and a checkpoint in the middle: what is loaded is what steps."""
    one = tiny_llama()
    other = copy.deepcopy(one)
    first, second = make_optimizer(one, recipe(name=name)), make_optimizer(other, recipe(name=name))
    second.load_state_dict(second.state_dict())
    train(one, first)
    train(other, second)
    resumed = make_optimizer(other, recipe(name=name))
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    set_learning_rate(first, RATE / 2)
    set_learning_rate(resumed, RATE / 2)
    train(one, first)
    train(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_steps_in_the_backward_pass_are_those_after_it(name: str) -> None:
    """Also of a tied embedding, whose gradient comes from two places, and of layers that are computed twice."""
    after, inside = tiny_llama(tied=True), tiny_llama(tied=True)
    inside.train()
    apply_checkpointing(inside, ParallelSection(checkpointing=True))
    optimizer = make_optimizer(after, recipe(name=name))
    ours = make_optimizer(inside, recipe(name=name, in_backward=True, clip_norm=None))
    assert isinstance(ours, InBackwardOptimizer)
    ours.step_in_backward()
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        ids = torch.randint(80, (2, 12), generator=generator)
        for one in (optimizer, ours):
            set_learning_rate(one, RATE / (step + 1))
        after(ids, labels=ids).loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in after.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        inside(ids, labels=ids).loss.backward()
        assert all(parameter.grad is None for parameter in inside.parameters())
        assert float(ours.take_norm()) == pytest.approx(float(norm), rel=1e-6)
    for one, other in zip(after.parameters(), inside.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-8)
