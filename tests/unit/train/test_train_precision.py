"""16-bit arithmetic: fp16's loss scale against torch's own by hand, and losses that do not overflow."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from packhorse.errors import UserError
from packhorse.plan.command import worker_env
from packhorse.plan.run_plan import Topology
from packhorse.recipe.schema import Recipe
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.precision import refuse_small_loss_scale, scale_on_cpu, set_matmul_precision
from packhorse.train.objectives.token_loss import token_loss_sum
from tiny import TINY

RATE, CLIP = 1e-2, 0.5
# The second overflows fp16.
SIZES = [1e-2, 1e3, 1e-2]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    made = Accelerator(cpu=True, mixed_precision="fp16")
    scale_on_cpu(made)
    yield made
    AcceleratorState._reset_state(reset_partial_state=True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(step: int) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(step))


def test_a_step_that_overflows_is_left_out_and_counted(accelerator: Accelerator) -> None:
    model = network()
    theirs = copy.deepcopy(model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    engine = Engine(accelerator, prepared_model, prepared_optimizer, 1.0, CLIP, None)

    by_hand = torch.optim.AdamW(theirs.parameters(), lr=RATE, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    skipped = []
    for step, size in enumerate(SIZES):
        with engine.micro_step(is_last=True):
            our_loss = prepared_model(batch(step)).float().pow(2).sum() * size
            engine.backward(our_loss)
        before = copy.deepcopy(model.state_dict())
        engine.step()
        _, norm = engine.finish_step([our_loss.detach()])
        skipped.append(engine.step_was_skipped)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()) == skipped[-1]

        with torch.autocast("cpu", torch.float16):
            loss = theirs(batch(step)).float().pow(2).sum() * size
        scaler.scale(loss).backward()
        scaler.unscale_(by_hand)
        expected = torch.cat([parameter.grad.double().reshape(-1) for parameter in theirs.parameters()]).norm()
        nn.utils.clip_grads_with_norm_(theirs.parameters(), CLIP, expected)
        scaler.step(by_hand)
        scaler.update()
        by_hand.zero_grad()
        assert float(norm) == pytest.approx(float(expected), rel=1e-9, abs=0, nan_ok=True)
        assert engine.loss_scale == scaler.get_scale()
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), theirs.parameters(), strict=True))
    assert skipped == [False, True, False]


def test_a_scale_that_cannot_go_down_ends_the_run() -> None:
    refuse_small_loss_scale(1.0)
    with pytest.raises(UserError, match="overflow fp16 even at a loss scale of 0.5"):
        refuse_small_loss_scale(0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_loss_of_many_tokens_is_exact_in_16_bit(dtype: torch.dtype) -> None:
    """Their sum is beyond fp16's 65,504, and beyond the 8 bits of bf16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2000, 64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(300, 64, generator=generator).to(dtype).mul_(2).requires_grad_()
    labels = torch.randint(300, (2000,), generator=generator)
    loss = token_loss_sum(hidden, weight, None, labels)
    loss.backward()
    wide, wide_weight = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    expected = F.cross_entropy(wide @ wide_weight.T, labels, reduction="sum")
    expected.backward()
    assert expected.item() > 65504
    assert loss.item() == pytest.approx(expected.item(), rel=3e-4)
    for one, other in ((hidden, wide), (weight, wide_weight)):
        assert one.grad is not None
        assert other.grad is not None
        assert float((one.grad.float() - other.grad).norm() / other.grad.norm()) < 0.01


@pytest.mark.parametrize(("tf32", "precision"), [(True, "high"), (False, "highest")])
def test_tf32_is_set_on_purpose(tf32: bool, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if not tf32 else "highest")
        set_matmul_precision(tf32)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_deterministic_kernels_are_chosen_by_the_recipe_and_need_cublas_to_agree() -> None:
    laptop = Topology(device="cpu", engine="ddp", num_nodes=1, processes_per_node=1, threads_per_process=1)
    gpus = laptop.model_copy(update={"device": "cuda"})
    for wanted in (True, False):
        recipe = Recipe.model_validate(TINY | {"deterministic": wanted})
        # The two values that torch accepts are in torch.use_deterministic_algorithms's documentation.
        assert (worker_env(recipe, gpus).get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")) == wanted
        assert "CUBLAS_WORKSPACE_CONFIG" not in worker_env(recipe, laptop)
