"""The float32 weights that DeepSpeed steps under bf16 and fp16, set from a checkpoint.

DeepSpeed makes them from the 16-bit weights that the model has when it starts, and a run that goes on would begin from
rounded ones. Checkpoints hold them as the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from packhorse.model.load import ModelRequest, load_model, open_model
from packhorse.model.methods.attach import is_adapted, stored_adapter
from packhorse.train.checkpoint.zero_state import has_master, set_master


def load_masters(model: nn.Module, folder: Path, trust_remote_code: bool) -> None:
    """Sets the float32 weights of a model whose 16-bit ones were loaded from the same folder.

    Args:
        model: Not wrapped, with its optimizer.
        folder: The checkpoint's `model` or `adapter`.
        trust_remote_code: As it was loaded.
    """
    wanted = {name: parameter for name, parameter in model.named_parameters() if has_master(parameter)}
    if not wanted:
        return
    if is_adapted(model):
        pairs: Iterator[tuple[nn.Parameter, Tensor]] = iter(stored_adapter(model, folder))
    else:
        whole = _stored_model(folder, trust_remote_code)
        pairs = ((wanted.pop(name), value) for name, value in whole if name in wanted)
    for parameter, value in pairs:
        set_master(parameter, value)
    assert is_adapted(model) or not wanted, "the model was loaded from this very folder"


def _stored_model(folder: Path, trust_remote_code: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights by the model's names, float32, on the CPU; a unit of the model is in memory at a time."""
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
    for unit in weights.units:
        weights.fill(unit)
        yield from _real(weights.model)
        for name in unit.names:
            weights.model.get_submodule(name).to_empty(device="meta")
    weights.fill_rest()
    yield from _real(weights.model)


def _real(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in model.named_parameters() if not value.is_meta)
