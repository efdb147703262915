"""A finished adapter in peft's form, as changes of the tensors of its base.

Shapes: W [out, in], A [r, in], B [out, r]; W' = W + s B A, s = alpha / r, or alpha / √r with rank stabilisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from packhorse.errors import UserError
from packhorse.model.methods.adapter_files import WEIGHTS_FILE

PREFIX: Final = "base_model.model."
LOW_RANK: Final = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE: Final = ".lora_magnitude_vector"
ROWS: Final = ".token_adapter.trainable_tokens_delta"


Apply = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Change:
    """How training changed one tensor of the base.

    Attributes:
        open: Read what changes it; returns the function of some rows of the tensor that training saw, in fp32, and
            which rows they are, that returns the trained rows, in fp32.
        is_low_rank: Whether a product of two matrices is added.
    """

    open: Callable[[], Apply]
    is_low_rank: bool


class StoredAdapter:
    """An adapter on disk."""

    def __init__(self, folder: Path) -> None:
        """Open it.

        Raises:
            UserError: The folder holds no adapter.
        """
        if not (folder / WEIGHTS_FILE).is_file():
            raise UserError(
                f"{folder} has no {WEIGHTS_FILE}.",
                "training writes the adapter there when it ends.",
                f"let the run finish: packhorse resume {folder.parent}.",
            )
        self.folder = folder
        self.config: Any = PeftConfig.from_pretrained(str(folder))
        opened: Any = safe_open
        self._opened = opened(folder / WEIGHTS_FILE, framework="pt")
        self._keys: list[str] = self._opened.keys()

    @property
    def can_stream(self) -> bool:
        """Whether each change is one of a tensor of the base: experts and IA3 are merged by peft, as a whole model."""
        return self.config.peft_type == "LORA" and not self.config.target_parameters

    def changes(self) -> dict[str, Change]:
        """Return the changes by the name of the base's tensor; read when they are applied.

        Raises:
            UserError: A tensor is of no known kind, or every B is zero.
        """
        changes = dict(self._changes())
        unknown = [key for key in self._keys if not key.startswith(PREFIX)]
        if unknown:
            raise UserError(
                f"{self.folder} holds {unknown[0]}, whose name does not begin with {PREFIX}.",
                "peft would only warn, and merge nothing: the model would answer as its base.",
                "write the adapter again with peft's `save_pretrained`.",
            )
        zero = [key for key in self._keys if key.endswith((".lora_B.weight", ".lora_embedding_B"))]
        if zero and not any(bool(self._read(key).any()) for key in zero):
            raise UserError(
                f"each of {len(zero)} B matrices of the adapter in {self.folder} is zero.",
                "no step has changed it: the merged model would be the base.",
                "train the run to its end, then export it.",
            )
        return changes

    def _changes(self) -> Iterator[tuple[str, Change]]:
        for key in self._keys:
            name = key.removeprefix(PREFIX)
            if name.endswith((".lora_A.weight", ".lora_embedding_A")):
                module = name.rpartition(".lora_")[0]
                yield f"{module}.weight", Change(self._low_rank(module, ".lora_embedding" in name), is_low_rank=True)
            elif name.endswith(ROWS):
                module = name.removesuffix(ROWS)
                yield f"{module}.weight", Change(self._rows(key, module), is_low_rank=False)
            elif not name.endswith((*LOW_RANK, MAGNITUDE, f"{MAGNITUDE}.weight")):
                yield name, Change(self._whole(key), is_low_rank=False)

    def _read(self, key: str) -> Tensor:
        tensor: Tensor = self._opened.get_tensor(key)
        return tensor.float()

    def _whole(self, key: str) -> Callable[[], Apply]:
        def opened() -> Apply:
            value = self._read(key)
            return lambda _, rows: value[rows]

        return opened

    def _low_rank(self, module: str, is_embedding: bool) -> Callable[[], Apply]:
        kind, end = ("lora_embedding", "") if is_embedding else ("lora", ".weight")
        keys = [f"{PREFIX}{module}.{kind}_{letter}{end}" for letter in "AB"]
        magnitude = next((key for key in self._keys if key.startswith(f"{PREFIX}{module}{MAGNITUDE}")), None)

        def opened() -> Apply:
            a, b = (self._read(key) for key in keys)
            if is_embedding or self.config.fan_in_fan_out:  # these weights are stored [in, out]
                a, b = b.T, a.T
            scale = self._scale(module, b.shape[1])
            lengths = self._read(magnitude).reshape(-1, 1) if magnitude is not None else None

            def apply(weight: Tensor, rows: slice) -> Tensor:
                merged = torch.addmm(weight, b[rows], a, alpha=scale)
                if lengths is None:
                    return merged
                # DoRA (arXiv 2402.09353): the direction of each row, times its trained length.
                factors: Tensor = lengths[rows] / merged.norm(dim=1, keepdim=True)
                return merged * factors

            return apply

        return opened

    def _scale(self, module: str, rank: int) -> float:
        config = self.config
        # A pattern names modules; the other modules have the adapter's own alpha.
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))

    def _rows(self, key: str, module: str) -> Callable[[], Apply]:
        given = self.config.trainable_token_indices
        indices = given if isinstance(given, list) else given[get_pattern_key(given, module)]

        def opened() -> Apply:
            values = dict(zip(indices, self._read(key), strict=True))

            def apply(weight: Tensor, rows: slice) -> Tensor:
                changed = weight.clone()
                for index in values.keys() & set(range(rows.start, rows.stop)):
                    changed[index - rows.start] = values[index]
                return changed

            return apply

        return opened
