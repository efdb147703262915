"""Finds where NaN or Inf came from: which rank, micro-batch, packs and rows, or which weight.

Runs only after a bad step, so it may take as long as a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from packhorse.data.packs.loader import MicroBatch, PackLoader, StepBatch
from packhorse.model.sequence import SequenceGroup
from packhorse.model.sharded import is_partitioned
from packhorse.train.checkpoint.weights import unwrapped
from packhorse.train.engine.engine import Engine
from packhorse.train.objectives.objective import Objective
from packhorse.train.ranks.agreement import texts_of_ranks

MAX_SHOWN = 8
IN_GRADIENT = "weights and losses are finite on every rank"
# Each of DeepSpeed's backward passes exchanges gradients.
UNDER_ZERO = f"{IN_GRADIENT}; ZeRO does not show which rank's gradient is not"
FINITE_AGAIN = f"{IN_GRADIENT}, and so are the gradients of each, computed once more: check the devices"


@dataclass(frozen=True)
class Cause:
    """What all ranks found together; equal on every rank.

    Attributes:
        sentences: Findings, each with the ranks that found it.
        in_weights: A weight itself is NaN or Inf, so skipping steps fixes nothing.
    """

    sentences: tuple[str, ...]
    in_weights: bool

    def __str__(self) -> str:
        return "; ".join(self.sentences)


def find_cause(
    engine: Engine,
    loader: PackLoader,
    objective: Objective,
    sequence: SequenceGroup | None,
    step: int,
    batch: StepBatch,
    losses: list[Tensor],
    compute_again: bool,
) -> Cause:
    """Check weights, then losses, then each rank's own gradients; a collective.

    Args:
        engine: Engine that trained the step.
        loader: Source of the step's batch.
        objective: Computes the loss of a micro-batch.
        sequence: Ranks that share each pack.
        step: Step number, counted from 1.
        batch: Batch of that step.
        losses: Sum of unit losses of each of its micro-batches on this rank.
        compute_again: Where weights and losses are finite, compute the gradient of each micro-batch once more. After
            that the engine must not train any further.
    """
    findings = list(_bad_weights(unwrapped(engine)))
    in_weights = _any_rank(engine, findings)
    if not in_weights:
        rows = loader.rows(step - 1)
        labels = [_label(index, rows) for index in range(len(rows))]
        findings = [
            f"the loss of {label} is {float(loss)}"
            for label, loss in zip(labels, losses, strict=True)
            if not bool(torch.isfinite(loss))
        ]
        if not _any_rank(engine, findings) and (engine.is_deepspeed or not compute_again):
            return Cause((UNDER_ZERO if engine.is_deepspeed else IN_GRADIENT,), in_weights=False)
        if not _any_rank(engine, findings):
            pairs = zip(labels, batch.micro_batches, strict=True)
            objective = objective.for_step(engine, batch.micro_batches, sequence)
            findings = [
                line for label, micro in pairs for line in _bad_gradients(engine, objective, sequence, label, micro)
            ]
            if not _any_rank(engine, findings):
                return Cause((FINITE_AGAIN,), in_weights=False)
    by_rank = [text.split("\n") if text else [] for text in texts_of_ranks(engine, "\n".join(findings))]
    return Cause(_with_ranks(by_rank), in_weights)


def _any_rank(engine: Engine, sentences: list[str]) -> bool:
    return engine.sum_over_ranks([len(sentences)])[0] > 0


def _bad_weights(model: nn.Module) -> Iterator[str]:
    """Yield a sentence for each weight that is not finite in the part that this rank holds."""
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)  # this rank's part under ZeRO-3
        local = held.to_local() if isinstance(held, DTensor) else held.detach()
        # Minimum and maximum are NaN where any value is; unlike isfinite on the whole, this allocates nothing.
        if local.is_floating_point() and local.numel() and not all(map(_is_finite, torch.aminmax(local))):
            yield f"the weight {name} holds NaN or Inf"


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value))


def _label(index: int, rows: list[dict[int, list[int]]]) -> str:
    """Describe a micro-batch by its position, packs and rows."""
    packs = "; ".join(f"pack {pack} with rows {_few(documents)}" for pack, documents in rows[index].items())
    return f"micro-batch {index + 1} of {len(rows)} ({packs or 'no packs'})"


def _few(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:MAX_SHOWN]))
    return f"{shown} and {len(numbers) - MAX_SHOWN} more" if len(numbers) > MAX_SHOWN else shown


def _bad_gradients(
    engine: Engine, objective: Objective, sequence: SequenceGroup | None, label: str, micro_batch: MicroBatch
) -> Iterator[str]:
    """Yield where this rank's gradient of a micro-batch, before ranks exchange it, stops being finite.

    `torch.autograd.grad` computes just these tensors: no gradient is accumulated, exchanged or stepped, whatever the
    engine. Every rank makes the same number of passes.
    """
    model = unwrapped(engine)
    # An engine that shards weights computes with other tensors in their place.
    whole = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not isinstance(parameter, DTensor) and not is_partitioned(parameter)
    }
    with engine.micro_step(is_last=False), _outputs_of_layers(model) as outputs:
        loss = objective(engine.model, micro_batch, engine.device, sequence).total
        tensors = {f"the output of {name}": output for name, output in outputs.items()} | whole
        gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    # NaN spreads on the way back to the embedding, so it began at the last bad tensor in the order of the model.
    for name, gradient in reversed(list(zip(tensors, gradients, strict=True))):
        if gradient is not None and not all(map(_is_finite, torch.aminmax(gradient))):
            yield f"the gradient of {label} is not finite, starting at {name}"
            return


@contextmanager
def _outputs_of_layers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of embedding and decoder layers in a forward pass, all of them requiring a gradient."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    outputs: dict[str, Tensor] = {}

    def collect(name: str, output: Any) -> None:  # noqa: ANN401
        first = output[0] if isinstance(output, tuple) else output
        if not first.requires_grad:
            first.requires_grad_()  # the output of a frozen embedding
        outputs.setdefault(name, first)

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: collect(name, output))
        for name, module in model.named_modules()
        if module is embedding or type(module).__name__.removeprefix("FSDP") in kinds
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _with_ranks(by_rank: list[list[str]]) -> tuple[str, ...]:
    """Return the first few sentences, each once, after the ranks that found it."""
    ranks_of: dict[str, list[int]] = {}
    for rank, sentences in enumerate(by_rank):
        for sentence in sentences:
            ranks_of.setdefault(sentence, []).append(rank)
    lines = [f"rank{'s' * (len(ranks) > 1)} {_few(ranks)}: {sentence}" for sentence, ranks in ranks_of.items()]
    more = len(lines) - MAX_SHOWN
    return (*lines[:MAX_SHOWN], *([f"and {more} more findings"] if more > 0 else []))
