"""The norm that clips: float64's, for plain and for sharded gradients; clipping as torch does it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from packhorse.train.engine.gradient_norm import clip_gradients, gradient_norm

SHAPES = [(700, 300), (1024,), (5,), (3, 1024), ()]


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(1)
    made = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape)
    return [*made, nn.Parameter(torch.zeros(3))]  # one that got no gradient


def in_float64(gradients: list[Tensor]) -> float:
    return float(torch.cat([gradient.double().reshape(-1) for gradient in gradients]).norm())


def test_the_norm_is_that_of_float64() -> None:
    made = parameters()
    expected = in_float64([p.grad for p in made if p.grad is not None])
    assert float(gradient_norm(made)) == pytest.approx(expected, rel=1e-8)


def test_a_large_gradient_keeps_seven_digits_where_torchs_own_norm_does_not() -> None:
    one = nn.Parameter(torch.zeros(1 << 23))
    one.grad = torch.randn(1 << 23, generator=torch.Generator().manual_seed(2))
    expected = in_float64([one.grad])
    assert float(gradient_norm([one])) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_clipping_scales_as_torch_does(largest: float) -> None:
    ours, theirs = parameters(), parameters()
    clip_gradients(ours, largest, gradient_norm(ours))
    nn.utils.clip_grad_norm_(theirs, largest)
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=0)  # torch's own norm is fp32's


def test_no_gradient_at_all_has_the_norm_0() -> None:
    assert float(gradient_norm([nn.Parameter(torch.zeros(3))])) == 0.0


def test_a_gradient_that_is_no_number_is_not_hidden() -> None:
    made = parameters()
    made[0].grad[3, 4] = float("nan")
    assert not torch.isfinite(gradient_norm(made))


def _of_two_ranks(rank: int, meeting: str, expected: float) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    made = [nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, [Shard(0)])) for shape in SHAPES[:-1]]
    for parameter, plain in zip(made, parameters(), strict=False):
        parameter.grad = distribute_tensor(plain.grad, mesh, [Shard(0)])
    norm = gradient_norm(made)
    assert float(norm) == pytest.approx(expected, rel=1e-8)
    clip_gradients(made, 0.5, norm)
    assert float(gradient_norm(made)) == pytest.approx(0.5, rel=1e-5)
    dist.destroy_process_group()


def test_sharded_gradients_have_the_norm_of_the_whole(tmp_path: Path) -> None:
    expected = in_float64([p.grad for p in parameters()[: len(SHAPES) - 1]])
    torch.multiprocessing.spawn(_of_two_ranks, (str(tmp_path / "meeting"), expected), nprocs=2)
