"""The two models of a comparison: the base, and what training made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

from transformers import PreTrainedModel

from packhorse.errors import UserError
from packhorse.model.load import ModelRequest, load_model
from packhorse.model.methods.attach import with_adapter

if TYPE_CHECKING:  # it takes seconds to import, and a whole model needs none of it
    from peft import PeftModel

Model: TypeAlias = Union[PreTrainedModel, "PeftModel"]
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        base: The weights that training started from, as it loaded them (a fresh model's seed included).
        tuned: RUN/model (Hugging Face form) after full fine-tuning, or RUN/adapter (peft form).
        vocab_size: Highest token id + 1 of the tokenizer.
    """

    base: ModelRequest
    tuned: Path
    vocab_size: int

    @property
    def is_adapter(self) -> bool:
        """The tuned weights stand beside the base, not in its place."""
        return (self.tuned / "adapter_config.json").is_file()


def load_base(subject: Subject) -> PreTrainedModel:
    """Loads the model that training started from, ready to answer."""
    # Training's attention wants packs; rows here are padded and need a mask, which sdpa honours.
    return load_model(replace(subject.base, attention="sdpa"), subject.vocab_size).eval()


def load_tuned(subject: Subject) -> Model:
    """Loads the model that training made; an adapter is attached to its base and can be switched off.

    Raises:
        UserError: Training has not left its result yet.
    """
    if subject.is_adapter:
        return with_adapter(load_base(subject), subject.tuned).eval()
    if not (subject.tuned / "config.json").is_file():
        raise UserError(
            f"{subject.tuned} holds neither config.json nor adapter_config.json.",
            "training writes its result there when it ends.",
            "let the run finish: `packhorse resume RUN`.",
        )
    tuned = replace(
        subject.base, source=str(subject.tuned), revision=None, config=None, attention="sdpa", new_tokens={}
    )
    return load_model(tuned, subject.vocab_size).eval()


def measure_both(subject: Subject, measure: Callable[[Model], Measured]) -> tuple[Measured, Measured]:
    """Measures base and tuned model in turn, with one model in memory at a time.

    Args:
        subject: What is compared.
        measure: Must not keep the model.

    Returns:
        What `measure` returned for the base and for the tuned model.
    """
    if not subject.is_adapter:
        return measure(load_base(subject)), measure(load_tuned(subject))
    model: Any = load_tuned(subject)
    with model.disable_adapter():
        base = measure(model)
    return base, measure(model)
