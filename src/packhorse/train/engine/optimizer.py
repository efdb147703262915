"""From the recipe to an optimizer of torch or bitsandbytes over the trainable parameters, in groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Muon, Optimizer

from packhorse.recipe.methods import LoraMethod
from packhorse.recipe.schema import OptimizerSection, Recipe
from packhorse.train.engine.joint_optimizer import InBackwardOptimizer, JointOptimizer

FACTOR = "learning_rate_factor"
"""Key of a parameter group: its learning rate over the schedule's."""

Group = dict[str, Any]


@dataclass(frozen=True, order=True)
class Kind:
    """What the parameters of a group have in common."""

    by_adamw: bool
    """Whether Muon leaves them to AdamW."""
    factor: float
    """Learning rate over the schedule's."""
    plain: bool
    """Whether they do not decay."""


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over the trainable parameters of `model`.

    Biases and norms, which have one dimension, do not decay. LoRA's B matrices take `learning_rate_ratio` times the
    learning rate (LoRA+, arXiv 2402.12354). Muon orthogonalises the steps of the layers' matrices, scaled to the size
    of AdamW's (arXiv 2502.16982), and leaves embeddings, head, biases and norms to AdamW.

    Args:
        model: As it is trained; under FSDP2 and ZeRO-3 it may be sharded already.
        recipe: Its `optimizer` and `method`.
    """
    section = recipe.optimizer
    groups = parameter_groups(model, recipe)
    if not section.in_backward:
        return _optimizer(groups, section)
    alone = [{**group, "params": [parameter]} for group in groups for parameter in group["params"]]
    return InBackwardOptimizer([_optimizer([group], section) for group in alone])


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[Group]:
    """Trainable parameters by what they have in common; the order is that of `Kind`, the same on every engine."""
    section = recipe.optimizer
    ratio = recipe.method.learning_rate_ratio if isinstance(recipe.method, LoraMethod) else 1.0
    vocabulary = {id(parameter) for parameter in _vocabulary_parameters(model)}
    by_kind: dict[Kind, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        num_dimensions = _num_dimensions(parameter)
        kind = Kind(
            by_adamw=section.name == "muon" and (num_dimensions != 2 or id(parameter) in vocabulary),
            factor=ratio if "lora_B" in name or "lora_embedding_B" in name else 1.0,
            # IA³'s factors start at 1, and decay would pull them to 0; peft stores them as matrices of width 1.
            plain=num_dimensions <= 1 or ".ia3_l." in name,
        )
        by_kind.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": section.learning_rate * kind.factor,
            "weight_decay": 0.0 if kind.plain else section.weight_decay,
            FACTOR: kind.factor,
            "by_adamw": kind.by_adamw,
        }
        for kind, parameters in sorted(by_kind.items())
    ]


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Sets it for every group, times the group's factor; before the backward pass, in which ZeRO steps."""
    for group in optimizer.param_groups:
        group["lr"] = value * group[FACTOR]


def _num_dimensions(parameter: Tensor) -> int:
    # ZeRO-3 keeps the true shape beside an emptied tensor.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _vocabulary_parameters(model: Any) -> Iterator[nn.Parameter]:  # noqa: ANN401
    """Those of embeddings and of the output head, whatever an adapter has put around them."""
    for find in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, find)() if hasattr(model, find) else None
        if module is not None:
            yield from module.parameters()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters()


def _optimizer(groups: list[Group], section: OptimizerSection) -> Optimizer:
    if section.name != "muon":
        return _MAKERS[section.name](groups, section)
    matrices = [group for group in groups if not group["by_adamw"]]
    others = [group for group in groups if group["by_adamw"]]
    parts: list[Optimizer] = []
    if matrices:
        parts.append(Muon(matrices, momentum=section.momentum, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(_adamw(others, section))
    return parts[0] if len(parts) == 1 else JointOptimizer(parts)


def _adamw(groups: list[Group], section: OptimizerSection) -> Optimizer:
    # Measured on the CPU: 19 ms for 21.5 million parameters, 144 ms unfused (a twentieth of a small step).
    return AdamW(groups, betas=section.betas, eps=section.epsilon, fused=True)


def _adafactor(groups: list[Group], section: OptimizerSection) -> Optimizer:
    return Adafactor(groups, lr=section.learning_rate)


def _of_bitsandbytes(name: str) -> Callable[[list[Group], OptimizerSection], Optimizer]:
    def make(groups: list[Group], section: OptimizerSection) -> Optimizer:
        # Imported by name, because it takes 2 to 7 CPU seconds that only these optimizers are worth.
        maker = getattr(import_module("bitsandbytes.optim"), name)
        more = {} if "Lion" in name else {"eps": section.epsilon}
        optimizer: Optimizer = maker(groups, lr=section.learning_rate, betas=section.betas, **more)
        return optimizer

    return make


_MAKERS: dict[str, Callable[[list[Group], OptimizerSection], Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "adamw_8bit": _of_bitsandbytes("AdamW8bit"),
    "paged_adamw": _of_bitsandbytes("PagedAdamW"),
    "paged_adamw_8bit": _of_bitsandbytes("PagedAdamW8bit"),
    "lion": _of_bitsandbytes("Lion"),
    "lion_8bit": _of_bitsandbytes("Lion8bit"),
}
