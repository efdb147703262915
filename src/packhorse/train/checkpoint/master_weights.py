"""Loads weights from a checkpoint into a model under its engine, and DeepSpeed's float32 master weights.

Under bf16 and fp16 DeepSpeed makes master weights from the model's 16-bit weights at the start, so a resumed run would
begin from rounded ones. Checkpoints store the master weights as the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from packhorse.model.load import ModelRequest, load_model, open_model
from packhorse.model.methods.adapter_files import stored_adapter
from packhorse.model.methods.attach import is_adapted
from packhorse.model.sharded import assign, is_partitioned
from packhorse.train.checkpoint.zero_state import has_master_weight, own_part, set_master_weight


def load_master_weights(model: nn.Module, folder: Path, trust_remote_code: bool) -> None:
    """Set the master weights of a model from a checkpoint's folder; its 16-bit weights are not changed."""
    masters = {name: parameter for name, parameter in model.named_parameters() if has_master_weight(parameter)}
    for parameter, value in _stored_weights(model, folder, trust_remote_code, masters):
        set_master_weight(parameter, value)


def load_saved_weights(model: nn.Module, folder: Path, trust_remote_code: bool) -> None:
    """Set the weights that a checkpoint would save, of a model that has trained under any engine; a collective.

    The 16-bit copies of master weights are not changed: the model is then saved, not used.
    """
    load_master_weights(model, folder, trust_remote_code)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = {name: parameter for name, parameter in trained.items() if not has_master_weight(parameter)}
    for parameter, value in _stored_weights(model, folder, trust_remote_code, plain):
        assign(parameter, value)


def _stored_weights(
    model: nn.Module, folder: Path, trust_remote_code: bool, wanted: Mapping[str, nn.Parameter]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each wanted parameter with its stored value, in the same order on every rank."""
    if not wanted:
        return
    if is_adapted(model):
        ids = {id(parameter) for parameter in wanted.values()}
        yield from ((parameter, value) for parameter, value in stored_adapter(model, folder) if id(parameter) in ids)
        return
    missing = dict(wanted)
    for name, value in _stored_model(folder, trust_remote_code, wanted):
        if name in missing:
            yield missing.pop(name), value
    assert not missing, "the folder holds this model"


def _stored_model(
    folder: Path, trust_remote_code: bool, wanted: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights by the model's names, float32, on the CPU, with one unit of the model in memory at a time.

    Of a wanted weight the rows of this rank's part are read; other weights have any values.
    """
    request = ModelRequest(
        source=str(folder),
        revision=None,
        config=None,
        seed=0,
        dtype=torch.float32,
        attention="eager",  # nothing is computed
        quantization=None,
        trust_remote_code=trust_remote_code,
        device=torch.device("cpu"),
    )
    weights = open_model(request, vocab_size=0)
    if weights is None:
        yield from load_model(request, vocab_size=0).named_parameters()
        return
    weights.kept_rows = lambda name, shape: _rows_of(wanted[name], shape) if name in wanted else slice(0)
    for unit in weights.units:
        weights.fill(unit)
        yield from _loaded(weights.model)
        for name in unit.names:
            weights.model.get_submodule(name).to_empty(device="meta")
    weights.fill_rest()
    yield from _loaded(weights.model)


def _rows_of(parameter: nn.Parameter, shape: Sequence[int]) -> slice:
    """Return the rows that hold this rank's part of a master weight under stage 3; all rows of any other weight."""
    if not (is_partitioned(parameter) and has_master_weight(parameter)):
        return slice(0, shape[0])
    begin, end = own_part(parameter)
    width = prod(shape[1:])
    return slice(begin // width, -(-end // width))


def _loaded(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in model.named_parameters() if not value.is_meta)
