"""Where a number that is none came from: which rank, pass, packs and rows, or which weight.

Only asked once a step has gone wrong, so it may cost a step's time.
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
from packhorse.train.checkpoint.weights import unwrapped
from packhorse.train.engine.engine import Engine
from packhorse.train.objectives.forward import micro_batch_loss
from packhorse.train.ranks.texts import texts_of_ranks

MOST_SHOWN = 8
IN_GRADIENT = "weights and losses are finite on every rank"
# Each backward pass of DeepSpeed's exchanges gradients.
UNDER_ZERO = f"{IN_GRADIENT}; whose gradient is not, ZeRO does not let see"
FINITE_AGAIN = f"{IN_GRADIENT}, and so are the gradients of each, computed once more: look at the devices"


@dataclass(frozen=True)
class Cause:
    """What all ranks found, the same on each.

    Attributes:
        sentences: Each with the ranks that say it.
        in_weights: A weight itself is no number: leaving steps out mends nothing.
    """

    sentences: tuple[str, ...]
    in_weights: bool

    def __str__(self) -> str:
        return "; ".join(self.sentences)


def find_cause(
    engine: Engine,
    loader: PackLoader,
    sequence: SequenceGroup | None,
    step: int,
    batch: StepBatch,
    losses: list[Tensor],
    compute_again: bool,
) -> Cause:
    """Looks at weights, then at losses, then at each rank's own gradients; a collective.

    Args:
        engine: As it trained the step.
        loader: Where the step's batch came from.
        sequence: The ranks that share each pack.
        step: Counted from 1.
        batch: Of that step.
        losses: Sum of token losses of each of its micro-batches on this rank.
        compute_again: Where weights and losses say nothing, compute the gradient of each micro-batch once more. After
            that the engine must not train on.
    """
    mine = list(_bad_weights(unwrapped(engine)))
    in_weights = _some_rank(engine, mine)
    if not in_weights:
        rows = loader.rows(step - 1)
        named = [_named(index, rows) for index in range(len(rows))]
        mine = [
            f"the loss of {name} is {float(loss)}"
            for name, loss in zip(named, losses, strict=True)
            if not bool(torch.isfinite(loss))
        ]
        if not _some_rank(engine, mine) and (engine.is_deepspeed or not compute_again):
            return Cause((UNDER_ZERO if engine.is_deepspeed else IN_GRADIENT,), in_weights=False)
        if not _some_rank(engine, mine):
            pairs = zip(named, batch.micro_batches, strict=True)
            mine = [line for name, each in pairs for line in _bad_gradients(engine, sequence, name, each)]
            if not _some_rank(engine, mine):
                return Cause((FINITE_AGAIN,), in_weights=False)
    said = [text.split("\n") if text else [] for text in texts_of_ranks(engine, "\n".join(mine))]
    return Cause(_with_ranks(said), in_weights)


def _some_rank(engine: Engine, sentences: list[str]) -> bool:
    return engine.sum_over_ranks([len(sentences)])[0] > 0


def _bad_weights(model: nn.Module) -> Iterator[str]:
    """Of what this rank holds."""
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's part of this rank
        local = held.to_local() if isinstance(held, DTensor) else held.detach()
        # The smallest and the largest number are no numbers where any is none; unlike isfinite, this allocates nothing.
        if local.is_floating_point() and local.numel() and not all(map(_is_finite, torch.aminmax(local))):
            yield f"the weight {name} holds what is no number"


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value))


def _named(index: int, rows: list[dict[int, list[int]]]) -> str:
    """A micro-batch in words: its place, packs and rows."""
    packs = "; ".join(f"pack {pack} with rows {_few(documents)}" for pack, documents in rows[index].items())
    return f"micro-batch {index + 1} of {len(rows)} ({packs or 'no packs'})"


def _few(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:MOST_SHOWN]))
    return f"{shown} and {len(numbers) - MOST_SHOWN} more" if len(numbers) > MOST_SHOWN else shown


def _bad_gradients(engine: Engine, sequence: SequenceGroup | None, name: str, micro_batch: MicroBatch) -> Iterator[str]:
    """This rank's own gradients of a micro-batch, before ranks exchange them; every rank computes as many.

    Asked of autograd for just these tensors: no gradient is added up, exchanged or stepped, whatever the engine.
    """
    model = unwrapped(engine)
    # An engine that shards weights puts others in their place while it computes.
    whole = {
        each: parameter
        for each, parameter in model.named_parameters()
        if parameter.requires_grad and not isinstance(parameter, DTensor) and not hasattr(parameter, "ds_id")
    }
    with engine.micro_step(is_last=False), _outputs_of_layers(model) as outputs:
        loss = micro_batch_loss(engine.model, micro_batch, engine.device, sequence)
        asked = {f"the output of {each}": output for each, output in outputs.items()} | whole
        found = torch.autograd.grad(loss, list(asked.values()), allow_unused=True)
    # What is none stays so on the way back to the embedding: it began at the last one in the order of the model.
    for each, gradient in reversed(list(zip(asked, found, strict=True))):
        if gradient is not None and not all(map(_is_finite, torch.aminmax(gradient))):
            yield f"the gradient of {name} is no number from {each} on"
            return


@contextmanager
def _outputs_of_layers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects what embedding and decoder layers give in a forward pass; a gradient comes back to all of them."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    outputs: dict[str, Tensor] = {}

    def collect(name: str, output: Any) -> None:  # noqa: ANN401
        first = output[0] if isinstance(output, tuple) else output
        if not first.requires_grad:
            first.requires_grad_()  # a frozen embedding's
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


def _with_ranks(sentences: list[list[str]]) -> tuple[str, ...]:
    """Each sentence once, after the ranks that say it; the first few."""
    said: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(sentences):
        for sentence in of_rank:
            said.setdefault(sentence, []).append(rank)
    lines = [f"rank{'s' * (len(ranks) > 1)} {_few(ranks)}: {sentence}" for sentence, ranks in said.items()]
    more = len(lines) - MOST_SHOWN
    return (*lines[:MOST_SHOWN], *([f"and {more} more findings"] if more > 0 else []))
