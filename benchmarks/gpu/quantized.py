"""Part `quantized`: LoRA on bf16, nf4 and int8 weights of one model: time, peak, and loss beside bf16's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from runs import TINY, write_model
from setting import Case, Figures, Setting
from speed import CONFIG, Variant, measured

LAYERS = 8
METHODS = {
    "LoRA on bf16": {"kind": "lora"},
    "QLoRA on nf4": {"kind": "qlora"},
    "QLoRA on int8": {"kind": "qlora", "quantization": "int8"},
}


def cases(setting: Setting) -> Iterator[Case]:
    """Yield each type of weights, recomputed and not; layers have the widths of an 8B."""
    config = TINY if setting.smoke else {**CONFIG, "num_hidden_layers": LAYERS}
    base = write_model(setting.folder / "base", config, setting)
    losses: list[float] = []
    for checkpointing in (True, False):
        for name, method in METHODS.items():
            variant = Variant(name, method={**method, "dropout": 0.0}, parallel={"checkpointing": checkpointing})
            words = f"{name}, {'every layer' if checkpointing else 'nothing'} recomputed"
            yield words, partial(_figures, setting, variant, base, losses)


def _figures(setting: Setting, variant: Variant, base: Path, losses: list[float]) -> Figures:
    figures = measured(setting, variant, base, random=False)
    losses.append(figures["first loss"])
    return figures | {"loss ÷ bf16's - 1": figures["first loss"] / losses[0] - 1}
