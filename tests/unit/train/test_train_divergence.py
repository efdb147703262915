"""Divergence from a teacher: values and gradients against full logits in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from packhorse.track.meter import resident_peak_bytes
from packhorse.train.objectives import divergence
from packhorse.train.objectives.divergence import DistilLoss, Teacher, TopTeacher, WholeTeacher, distil_sums

S, H, G, V = 600, 16, 24, 97


def oracle(student: Tensor, teacher: Tensor, labels: Tensor, loss: DistilLoss) -> Tensor:
    """Textbook loss over full logits, with torch's own functions."""
    shared = min(student.shape[1], teacher.shape[1])
    q = F.log_softmax(student[:, :shared] / loss.temperature, -1)
    p = F.log_softmax(teacher[:, :shared] / loss.temperature, -1)
    middle = ((p.exp() + q.exp()) / 2).log()
    value = {
        "forward": lambda: F.kl_div(q, p, reduction="sum", log_target=True),
        "reverse": lambda: F.kl_div(p, q, reduction="sum", log_target=True),
        "jsd": lambda: sum(F.kl_div(middle, one, reduction="sum", log_target=True) for one in (p, q)) / 2,
    }[loss.divergence]()
    return value * loss.temperature**2 + loss.sft_weight * F.cross_entropy(student, labels, reduction="sum")


def tensors(vocabulary: int = V, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((S, H), (vocabulary, H), (vocabulary,))
    return [torch.randn(shape).mul(0.5).to(dtype).requires_grad_() for shape in shapes]


def teacher_tensors(vocabulary: int = V) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape) * 0.5 for shape in ((S, G), (vocabulary, G), (vocabulary,))]


LABELS = torch.arange(S) % 50


def check(
    loss: DistilLoss, ours: list[Tensor], target: list[Tensor], teacher: Teacher | None = None, tolerance: float = 1e-6
) -> Tensor:
    """Assert loss and gradients against full logits in float64, and return the sums."""
    wide = [tensor.detach().double().requires_grad_() for tensor in ours]
    sums = distil_sums(*ours, LABELS, teacher or WholeTeacher(*target), loss)
    expected = oracle(F.linear(*wide), F.linear(*(tensor.double() for tensor in target)), LABELS, loss)
    assert sums[0].item() == pytest.approx(expected.item(), rel=tolerance)
    sums[0].backward()
    expected.backward()
    for mine, plain in zip(ours, wide, strict=True):
        if mine.requires_grad:
            assert (mine.grad - plain.grad).norm() <= tolerance * plain.grad.norm()
    return sums.detach()


@pytest.mark.parametrize(
    "vocabularies", [(V, V), (V, V - 9), (V - 9, V)], ids=["equal", "student_padded", "teacher_padded"]
)
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("temperature", "sft_weight"), [(1.0, 0.0), (2.0, 0.3)])
def test_loss_and_gradients_are_those_of_full_logits(
    kind: divergence.Divergence, temperature: float, sft_weight: float, vocabularies: tuple[int, int]
) -> None:
    loss = DistilLoss(kind, temperature, sft_weight)
    check(loss, tensors(vocabularies[0]), teacher_tensors(vocabularies[1]))


def test_the_gradient_does_not_shrink_with_the_temperature() -> None:
    """Hinton et al. 2015, section 2: at a high temperature logits are matched, (z - v) / V, whatever the temperature.

    Both heads are without bias, and their logits have mean zero, as the limit requires.
    """
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 12).double() for _ in range(2))
    student, teacher = (logits - logits.mean(1, keepdim=True) for logits in (student, teacher))
    eye = torch.eye(12).double()
    student.requires_grad_()
    loss = DistilLoss("forward", temperature=1e4)
    distil_sums(student, eye, None, LABELS[:4], WholeTeacher(teacher, eye, None), loss)[0].backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 12, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1, 2)], ids=["hidden", "head"])
def test_frozen_tensors_get_no_gradient(frozen: tuple[int, ...]) -> None:
    ours = tensors()
    for index in frozen:
        ours[index].requires_grad_(False)
    check(DistilLoss(), ours, teacher_tensors())
    assert [tensor.grad is None for tensor in ours] == [index in frozen for index in range(3)]


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_teacher_that_is_the_student_gives_neither_loss_nor_gradient(kind: divergence.Divergence) -> None:
    ours = tensors()
    teacher = WholeTeacher(*(tensor.detach() for tensor in ours))
    sums = distil_sums(*ours, LABELS, teacher, DistilLoss(kind, 2.0))
    sums[0].backward()
    assert sums[0].item() == pytest.approx(0, abs=1e-3)  # of 600 tokens
    assert sums[4] == S
    assert max(float(tensor.grad.norm()) for tensor in ours) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("masters", [True, False], ids=["autocast", "16_bit_weights"])
def test_sixteen_bits_are_as_near_as_their_logits(dtype: torch.dtype, masters: bool) -> None:
    ours = tensors(dtype=torch.float32 if masters else dtype)
    with torch.autocast("cpu", dtype, enabled=masters):
        check(DistilLoss("forward", 1.0, 0.5), ours, teacher_tensors(), tolerance=2e-2)
    assert all(tensor.grad.dtype == tensor.dtype for tensor in ours)


def test_rare_tokens_learn_in_fp16() -> None:
    """A gradient of 1e-8 per token is zero in fp16, and a thousand such tokens are not."""
    student = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [-18.0, 1.0]], dtype=torch.float16)
    teacher = WholeTeacher(torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([0.0, -18.0]))
    student.data[0, 0] = 1.0
    student.data[0, 1] = 0.5
    sums = distil_sums(student, weight, None, LABELS[:1], teacher, DistilLoss())
    sums[0].mul(2**16).backward()
    expected = 2**16 * (math.exp(-17.5) - math.exp(-18.0))
    assert student.grad[0, 1].item() == pytest.approx(expected, rel=1e-2)


def top_of(target: list[Tensor], k: int, temperature: float = 1.0) -> TopTeacher:
    p = F.log_softmax(F.linear(*target) / temperature, -1).topk(k)
    return TopTeacher(p.indices, p.values)


@pytest.mark.parametrize(("temperature", "sft_weight"), [(1.0, 0.0), (2.0, 0.3)])
def test_all_kept_tokens_are_the_whole_teacher(temperature: float, sft_weight: float) -> None:
    target = teacher_tensors()
    kept = top_of(target, V, temperature)
    sums = check(DistilLoss("forward", temperature, sft_weight), tensors(), target, kept, tolerance=2e-6)
    whole = distil_sums(*tensors(), LABELS, WholeTeacher(*target), DistilLoss("forward", temperature, sft_weight))
    torch.testing.assert_close(sums, whole.detach(), rtol=1e-5, atol=1e-6)


def test_the_bucket_is_one_outcome_with_a_gradient_to_all_its_tokens() -> None:
    target, ours = teacher_tensors(), tensors()
    k = 5
    teacher = top_of(target, k)
    wide = [tensor.detach().double().requires_grad_() for tensor in ours]
    q = F.linear(*wide).softmax(-1)
    p = F.linear(*(tensor.double() for tensor in target)).softmax(-1)

    def lumped(probabilities: Tensor) -> Tensor:
        kept = probabilities.gather(1, teacher.ids)
        return torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)

    expected = F.kl_div(lumped(q).log(), lumped(p), reduction="sum")
    sums = distil_sums(*ours, LABELS, teacher, DistilLoss())
    assert sums[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums[3].item() == pytest.approx(p.gather(1, teacher.ids).sum().item(), rel=1e-6)
    entropy = -(lumped(p) * lumped(p).log()).sum()
    assert sums[2].item() == pytest.approx(entropy.item(), rel=1e-6)
    sums[0].backward()
    expected.backward()
    for mine, plain in zip(ours, wide, strict=True):
        assert (mine.grad - plain.grad).norm() <= 1e-6 * plain.grad.norm()


def test_more_kept_tokens_come_nearer_from_below() -> None:
    target = teacher_tensors()
    whole = distil_sums(*tensors(), LABELS, WholeTeacher(*target), DistilLoss()).tolist()
    kept = [distil_sums(*tensors(), LABELS, top_of(target, k), DistilLoss()).tolist() for k in (1, 4, 16, 64, V)]
    losses = [sums[0] for sums in kept]
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(whole[0], rel=1e-5)
    assert losses[0] < 0.9 * whole[0]


def test_tokens_that_the_teacher_excludes_are_finite() -> None:
    """Half-precision storage rounds the mass of kept tokens to more than 1, and rare tokens to -inf."""
    ids = torch.tensor([[3, 1]])
    teacher = TopTeacher(ids, torch.tensor([[0.0, -11.0]], dtype=torch.float16))
    student = torch.zeros(1, 4, requires_grad=True)
    sums = distil_sums(student, torch.eye(4), None, LABELS[:1], teacher, DistilLoss())
    sums[0].backward()
    assert sums.isfinite().all()
    assert student.grad.isfinite().all()


def test_a_micro_batch_without_supervised_tokens_reaches_every_weight() -> None:
    ours = [tensor.requires_grad_() for tensor in (torch.zeros(0, H), torch.zeros(V, H), torch.zeros(V))]
    teacher = WholeTeacher(torch.zeros(0, G), torch.zeros(V, G), None)
    sums = distil_sums(*ours, LABELS[:0], teacher, DistilLoss())
    sums[0].backward()
    assert sums.tolist() == [0.0] * 5
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in ours)


def test_memory_is_at_most_a_third_of_full_logits() -> None:
    """Measured in a process of its own: the chunks first, because a process's peak never falls."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch; torch.set_num_threads(1)
from test_train_divergence import measure
measure()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    chunked, full = map(int, ended.stdout.split())
    assert chunked <= full / 3, (chunked, full)


def measure() -> None:
    """Print by how many bytes our loss, and then that over full logits, raises the process's peak."""
    shapes = ((2048, 16), (16384, 16))
    student, weight = (torch.randn(shape, requires_grad=True) for shape in shapes)
    teacher = [torch.randn(shape) for shape in shapes]
    labels = torch.zeros(2048, dtype=torch.int64)
    start = resident_peak_bytes()
    distil_sums(student, weight, None, labels, WholeTeacher(*teacher, None), DistilLoss())[0].backward()
    chunked = resident_peak_bytes() - start
    oracle(F.linear(student, weight), F.linear(*teacher), labels, DistilLoss()).backward()
    print(chunked, resident_peak_bytes() - start)


def test_a_student_learns_more_from_a_good_teacher_than_from_few_random_answers() -> None:
    """Bigram models, 200 tokens of a random chain, equal steps: the held-out loss is nearer to the chain's entropy."""
    torch.manual_seed(0)
    chain = torch.distributions.Dirichlet(torch.full((20, 20), 0.5)).sample()
    context = torch.randint(20, (200,))
    answers = torch.multinomial(chain[context], 1)[:, 0]
    teacher = WholeTeacher(F.one_hot(context, 20).float(), chain.log().clamp(min=-20).T.contiguous(), None)
    held_out = {}
    for name, loss in {"sft": DistilLoss(weight=0.0, sft_weight=1.0), "distil": DistilLoss()}.items():
        weight = torch.zeros(20, 20, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            distil_sums(F.one_hot(context, 20).float(), weight, None, answers, teacher, loss)[0].div(200).backward()
            optimizer.step()
        held_out[name] = -(chain * weight.detach().T.log_softmax(-1)).sum(-1).mean().item()
    entropy = -(chain * chain.clamp(min=1e-20).log()).sum(-1).mean().item()
    assert held_out["distil"] - entropy < 0.5 * (held_out["sft"] - entropy), (held_out, entropy)
