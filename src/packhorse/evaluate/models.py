"""The two models of a comparison: the base and the tuned model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, Union

from transformers import PreTrainedModel

from packhorse.errors import UserError
from packhorse.model.load import ModelRequest, load_model
from packhorse.model.methods.adapter_files import with_adapter
from packhorse.run_folder.folder import relative

if TYPE_CHECKING:  # peft takes seconds to import, and a whole model does not need it
    from peft import PeftModel

Model: TypeAlias = Union[PreTrainedModel, "PeftModel"]
Measured = TypeVar("Measured")
BASE: Final = "base"
TUNED: Final = "tuned"


@dataclass(frozen=True)
class Subject:
    """Base and tuned model.

    Attributes:
        base: Weights that training started from, as it loaded them (including the seed of a fresh model).
        tuned: RUN/model (Hugging Face form) after full fine-tuning, or RUN/adapter (peft form).
        vocab_size: Highest token id + 1 of the tokenizer.
    """

    base: ModelRequest
    tuned: Path
    vocab_size: int

    @property
    def is_adapter(self) -> bool:
        """Return whether the tuned weights are an adapter of the base."""
        return (self.tuned / "adapter_config.json").is_file()


def load_base(subject: Subject) -> PreTrainedModel:
    """Load the model that training started from, in eval mode."""
    # The attention of training needs packs; rows here are padded and need a mask, which sdpa supports.
    return load_model(replace(subject.base, attention="sdpa"), subject.vocab_size).eval()


def load_tuned(subject: Subject) -> Model:
    """Load the model that training made, in eval mode; an adapter is attached to its base and can be disabled.

    Raises:
        UserError: Training has not written its result yet.
    """
    if subject.is_adapter:
        return with_adapter(load_base(subject), subject.tuned).eval()
    if not (subject.tuned / "config.json").is_file():
        raise UserError(
            f"{subject.tuned} holds neither config.json nor adapter_config.json.",
            "training writes its result there when it ends.",
            f"let the run finish: packhorse resume {relative(subject.tuned.parent)}",
        )
    tuned = replace(
        subject.base, source=str(subject.tuned), revision=None, config=None, attention="sdpa", new_tokens={}
    )
    return load_model(tuned, subject.vocab_size).eval()


def fingerprints(subject: Subject) -> tuple[str, str]:
    """Return fingerprints of the weights of base and tuned model: the request, and names, sizes and times of files."""
    base = f"{subject.base} {_files(Path(subject.base.source or ''))}"
    return base, f"{base} {_files(subject.tuned)}"


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of the weights in a folder; none if it is no folder, as for a hub name."""
    found = [(path, path.stat()) for path in sorted(folder.glob("*.safetensors"))] if folder.is_dir() else []
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def measure_both(subject: Subject, measure: Callable[[Model, str], Measured]) -> tuple[Measured, Measured]:
    """Measure base and tuned model in turn, with one model in memory at a time.

    Args:
        subject: Base and tuned model.
        measure: Function of a model and the fingerprint of its weights; it does not keep the model.

    Returns:
        Results of `measure` for the base and for the tuned model.
    """
    of_base, of_tuned = fingerprints(subject)
    if not subject.is_adapter:
        return measure(load_base(subject), of_base), measure(load_tuned(subject), of_tuned)
    model: Any = load_tuned(subject)
    with model.disable_adapter():
        base = measure(model, of_base)
    return base, measure(model, of_tuned)
