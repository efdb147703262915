"""The base as training saw it: in the type that it was loaded in, with new rows, and rounded to few bits by QLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from packhorse.errors import UserError
from packhorse.export.reference import load_layers
from packhorse.export.weight_files import WeightFiles
from packhorse.model.load import ModelRequest, Quantization, add_rows, load_model

FILES: Final = ["*.safetensors", "*.json"]


@dataclass(frozen=True)
class SeenBase:
    """The base of an adapter.

    Attributes:
        request: How training loaded it.
        files: Its weights.
        config: Its configuration.
        in_few_bits: Names of the weights that training held in 4 or 8 bits; empty where they stay unrounded.
        num_tokens: Tokens of the tokenizer.
    """

    request: ModelRequest
    files: WeightFiles
    config: PretrainedConfig
    in_few_bits: frozenset[str]
    num_tokens: int

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return self.files.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, with the rows of new tokens."""
        shape = self.files.shape(name)
        if not self.request.new_tokens or not self._has_tokens(name):
            return shape
        return (max(shape[0], self.num_tokens), *shape[1:])

    def read(self, name: str) -> Tensor:
        """Return a tensor with the values that training computed with, in its type or in fp32."""
        weight = self.files.read(name).to(self.request.dtype)
        if name in self.in_few_bits:
            assert self.request.quantization is not None
            return rounded(weight, self.request.quantization)
        if self.request.new_tokens and self._has_tokens(name):
            return self._with_new_rows(weight.float(), name)
        return weight

    def is_stored_as(self, name: str, dtype: torch.dtype) -> bool:
        """Return whether the stored tensor is what training saw, in this type."""
        stored = self.files.read(name).dtype
        is_grown = bool(self.request.new_tokens) and self._has_tokens(name)
        return name not in self.in_few_bits and not is_grown and stored == dtype == self.request.dtype

    def model(self, num_layers: int) -> Any:  # noqa: ANN401
        """Load the first layers as training saw them, in fp32."""
        model = load_layers(self.files.folder, self.config, num_layers, self.request.dtype)
        if self.request.new_tokens:
            add_rows(model, self.request.new_tokens, self.num_tokens)
        model = model.float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.in_few_bits:
                    parameter.copy_(self.read(name))
        return model

    def _has_tokens(self, name: str) -> bool:
        return name.endswith(("embed_tokens.weight", "lm_head.weight"))

    def _with_new_rows(self, weight: Tensor, name: str) -> Tensor:
        """Do for one tensor what `model.load.add_rows` does for a model."""
        grown = weight.new_zeros(self.shape(name))
        grown[: len(weight)] = weight
        for token, parts in self.request.new_tokens.items():
            grown[token] = grown[list(parts)].mean(0).to(self.request.dtype).float()
        return grown


def rounded(weight: Tensor, quantization: Quantization) -> Tensor:
    """Return a weight after bitsandbytes has stored it in few bits, in fp32."""
    if quantization.kind == "int8":
        values, scales, _ = int8_vectorwise_quant(weight.half())
        dense: Tensor = values.float() * (scales[:, None] / 127)
        return dense
    stored, state = quantize_4bit(
        weight, blocksize=64, compress_statistics=quantization.double, quant_type=quantization.kind
    )
    dense = dequantize_4bit(stored, state)
    return dense.float()


def open_base(request: ModelRequest, num_tokens: int, unrounded: bool, scratch: Path) -> SeenBase:
    """Open the base of an adapter.

    Args:
        request: How training loaded it.
        num_tokens: Tokens of the tokenizer.
        unrounded: Merge into the weights on disk although training saw them in few bits.
        scratch: Folder for the weights of a fresh model, which exist nowhere else.

    Raises:
        UserError: Weights are missing, or the base is not there.
    """
    folder = _folder(request, num_tokens, scratch)
    files = WeightFiles(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=request.trust_remote_code)
    is_rounded = request.quantization is not None and not unrounded
    few = linear_weights(config) if is_rounded else frozenset()
    return SeenBase(request, files, config, few, num_tokens)


def _folder(request: ModelRequest, num_tokens: int, scratch: Path) -> Path:
    if request.source is None:
        load_model(request, num_tokens).save_pretrained(scratch)
        return scratch
    if Path(request.source).is_dir():
        return Path(request.source)
    try:
        found = snapshot_download(request.source, revision=request.revision, allow_patterns=FILES)
    except OSError as error:
        raise UserError(
            f"the base {request.source} cannot be read: {str(error).splitlines()[0]}",
            "a merged model holds its weights.",
            "download it with `hf download`, or copy it back to where the run found it.",
        ) from error
    return Path(found)


def linear_weights(config: PretrainedConfig) -> frozenset[str]:
    """Return the names of the weights that transformers lets bitsandbytes hold: linear layers but the output head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
