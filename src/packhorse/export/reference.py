"""What an export is held against: rows of the run, and a model, whole or its first layers, with plain attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

WHOLE_MODEL_BYTES: Final = 2 * 2**30
"""A model up to this size in fp32 is compared whole; of a larger one, its first layers."""


@dataclass(frozen=True)
class HeldOutRow:
    """A row of the run.

    Attributes:
        ids: Token ids.
        positions: Positions, from 1, whose token is supervised.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]


def first_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """Return the configuration of a model that ends after its first layers."""
    fields = config.to_dict()
    fields["num_hidden_layers"] = num_layers
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:num_layers]
    cut: PretrainedConfig = type(config).from_dict(fields)
    return cut


def layers_to_compare(config: PretrainedConfig, fp32_bytes: int) -> int:
    """Return the layers that are compared: all of a small model, else as many as show every kind of layer."""
    if fp32_bytes <= WHOLE_MODEL_BYTES:
        return int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or []
    return max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])


def load_layers(folder: Path, config: PretrainedConfig, num_layers: int, dtype: Any = torch.float32) -> Any:  # noqa: ANN401
    """Load the first layers of a model from its folder, in eval mode, with plain attention."""
    cut = config if num_layers == config.num_hidden_layers else first_layers(config, num_layers)
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the weights of the layers that are not asked for
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, config=cut, dtype=dtype, attn_implementation="eager")
    finally:
        logging.set_verbosity(shown)
    return model.eval()


@torch.inference_mode()
def log_probabilities(model: Any, ids: Sequence[int]) -> Tensor:  # noqa: ANN401
    """Return the log-probabilities of the next token after each position, fp32 [positions, vocabulary]."""
    logits: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)
