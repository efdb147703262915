"""Reads, converts and quantises the weights of a checkpoint, one unit of the model at a time.

The files are mapped into memory, so the ranks of a node share what one of them has read, without their own copies.
transformers and bitsandbytes do the renaming, the fusing of experts and the quantisation. Of a weight that is only
renamed, a rank reads just the rows that it will keep.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

from packhorse.model.units import SCORE, Unit, copy_tree, draw_score, score_weight, select_branches, units_of
from packhorse.model_spec.stored_weights import misfit, refuse_incomplete

KeptRows = Callable[[str, Sequence[int]], slice]
"""Name and whole shape of a weight -> the rows that this rank keeps."""


@dataclass(frozen=True)
class _PartlyRead:
    """A stored tensor as transformers takes it, of which only some rows are read; the others have any values.

    The whole shape exists on the device until the unit is sharded, as it does for a tensor that is read whole; on the
    CPU, pages that nobody writes take no memory.
    """

    stored: Any
    rows: slice

    def __getitem__(self, _: object) -> _PartlyRead:
        return self

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.stored, name)

    def to(self, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
        """Return the tensor, with values in its rows."""
        read: Tensor = self.stored[self.rows]
        whole = torch.empty(self.stored.get_shape(), dtype=dtype or read.dtype, device=device)
        whole[self.rows] = read.to(device, whole.dtype)
        return whole


@dataclass
class StreamedWeights:
    """A checkpoint's weights and the empty model that they belong to.

    Attributes:
        model: Model on the meta device, without adapters at first; they may be added later.
        source: Folder or hub name, for messages.
        tensors: Each tensor of the checkpoint by its name there, read when it is used.
        config: How transformers converts and quantises them.
        units: Units to load one after another.
        files: Open files, until everything is read.
        kept_rows: Which rows of a plain weight are read; None reads all. Quantised weights are always read whole.
        seed: Seed of a reward model's head that the checkpoint lacks.
    """

    model: PreTrainedModel
    source: str
    tensors: Mapping[str, Any]
    config: LoadStateDictConfig
    units: list[Unit]
    files: ExitStack
    kept_rows: KeptRows | None = None
    seed: int = 0
    _tree: PreTrainedModel = field(init=False)
    _keys: dict[Unit | None, list[str]] = field(init=False)
    _plain: dict[str, str] = field(init=False, default_factory=dict)
    _draws_score: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._tree = cast(PreTrainedModel, copy_tree(self.model))
        self._keys = self._keys_by_unit()

    def fill(self, unit: Unit) -> None:
        """Load a unit, on the device of the request.

        Raises:
            UserError: A tensor has another shape than the model's, or cannot be converted.
        """
        self._fill(unit, lambda name: name in unit.names)

    def fill_rest(self) -> None:
        """Load what belongs to no unit, mostly buffers, and close the files."""
        names = [name for unit in self.units for name in unit.names]
        self._fill(None, lambda name: not any(_are_related(name, other) for other in names))
        self.files.close()
        # transformers reverts the used conversions when the model is saved.
        mapping = self.config.weight_mapping or []
        self.model._weight_conversions = [entry for entry in mapping if entry.was_used()]

    def _fill(self, unit: Unit | None, keep: Callable[[str], bool]) -> None:
        part = cast(PreTrainedModel, select_branches(self._tree, keep))
        trained = {name: parameter.requires_grad for name, parameter in part.named_parameters()}
        chosen = {key: self._stored(key) for key in self._keys[unit]}
        info, _ = convert_and_load_state_dict_in_model(part, chosen, self.config)
        self._refuse_misfits(info)
        if unit is not None and len(unit.names) > 1:
            self._tie(part, info)
        _make_buffers(part, self.config)
        if self._draws_score and any(name == SCORE for name, _ in part.named_modules()):
            draw_score(part, self.seed, _device_of(self.config), self.config.dtype)
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(trained[name] and parameter.is_floating_point())

    def _stored(self, key: str) -> Any:  # noqa: ANN401
        stored = self.tensors[key]
        shape = stored.get_shape()
        if self.kept_rows is None or key not in self._plain or not shape or self.config.hf_quantizer is not None:
            return stored
        return _PartlyRead(stored, self.kept_rows(self._plain[key], shape))

    def _tie(self, part: PreTrainedModel, info: LoadStateDictInfo) -> None:
        names = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        tied = part.all_tied_weights_keys.items()
        part.all_tied_weights_keys = {target: source for target, source in tied if {target, source} <= names}
        part.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)

    def _keys_by_unit(self) -> dict[Unit | None, list[str]]:
        """Return the checkpoint's keys by the unit that they fill; missing and unexpected ones are refused.

        Also notes in `_plain` which keys are parameters that are only renamed; no engine shards buffers.

        transformers converts one unit at a time without comparing it to the rest, so completeness is checked here, over
        all keys and before any tensor is read.
        """
        mapping = self.config.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        targets_of = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
        expected, prefix = self._tree.state_dict(), self._tree.base_model_prefix
        keys: dict[Unit | None, list[str]] = defaultdict(list)
        parameters = {name for name, _ in self._tree.named_parameters(remove_duplicate=False)}
        loaded, unexpected = set(), set()
        for key in sorted(self.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
            if name not in expected and key in expected:
                # The key already is a name in the model, and a renaming pattern matches it by accident.
                name, pattern = rename_source_key(key, [], [], prefix, expected)
            if name not in expected:
                unexpected.add(name)
                continue
            if pattern is None:
                loaded.add(name)
                if name in parameters:
                    self._plain[key] = name
            else:  # one stored tensor may become several weights
                targets = targets_of[pattern]
                loaded |= {name.replace(targets[0], target) for target in targets}
            keys[self._unit_of(name)].append(key)
        self._refuse_unless_complete(set(expected) - loaded, unexpected)
        return keys

    def _unit_of(self, name: str) -> Unit | None:
        return next((unit for unit in self.units if any(_is_inside(name, module) for module in unit.names)), None)

    def _refuse_unless_complete(self, missing: set[str], unexpected: set[str]) -> None:
        info = LoadStateDictInfo(missing, unexpected, set(), {}, [], set())
        # Removes keys that the architecture declares derived, or leftovers of an older version.
        self._tree._adjust_missing_and_unexpected_keys(info)
        tied = self._tree.all_tied_weights_keys
        # A checkpoint holds only one of two tied weights.
        partner = {**tied, **{source: target for target, source in tied.items()}}
        missing = {name for name in info.missing_keys if partner.get(name, name) in info.missing_keys}
        score = score_weight(self.model)
        self._draws_score = score in missing
        refuse_incomplete(self.source, missing, info.unexpected_keys, score)

    def _refuse_misfits(self, info: LoadStateDictInfo) -> None:
        if info.mismatched_keys:
            name, stored, expected = min(info.mismatched_keys)
            raise misfit(self.source, name, stored, expected)
        if info.conversion_errors:
            name, reason = min(info.conversion_errors.items())
            raise RuntimeError(f"{name} of {self.source} could not be converted: {reason}")


def open_weights(
    model: PreTrainedModel, source: str, files: Iterable[str], config: LoadStateDictConfig, seed: int
) -> StreamedWeights:
    """Open a checkpoint for a model on the meta device; reads only names and shapes.

    Raises:
        UserError: Weights are missing, or the model has no parameter for some.
    """
    opened = ExitStack()
    tensors: dict[str, Any] = {}
    for file in files:
        stored = opened.enter_context(safe_open(file, framework="pt", device="cpu"))
        tensors |= {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118  (safe_open is no mapping)
    return StreamedWeights(model, source, tensors, config, units_of(model), opened, seed=seed)


def _make_buffers(part: PreTrainedModel, config: LoadStateDictConfig) -> None:
    """Compute buffers that no checkpoint holds, such as the frequencies of rotary embeddings."""
    device = _device_of(config)
    for module in part.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    part.initialize_weights()  # skips what was loaded


def _device_of(config: LoadStateDictConfig) -> torch.device:
    return torch.device((config.device_map or {"": "cpu"})[""])


def _is_inside(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _are_related(name: str, other: str) -> bool:
    return name == other or _is_inside(name, other) or _is_inside(other, name)
