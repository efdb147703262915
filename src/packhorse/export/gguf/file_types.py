"""Types of GGUF files, and the type of each tensor in them: llama.cpp's own mix.

Source: `llama_tensor_get_type` in llama.cpp (MIT, github.com/ggml-org/llama.cpp, src/llama-quant.cpp).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Kind
from libgguf import quantize_rows
from numpy.typing import NDArray

from packhorse.errors import UserError

FILE_TYPES: Final = {
    "F32": (LlamaFileType.ALL_F32, Kind.F32),
    "F16": (LlamaFileType.MOSTLY_F16, Kind.F16),
    "BF16": (LlamaFileType.MOSTLY_BF16, Kind.BF16),
    "Q8_0": (LlamaFileType.MOSTLY_Q8_0, Kind.Q8_0),
    "Q6_K": (LlamaFileType.MOSTLY_Q6_K, Kind.Q6_K),
    "Q5_K_M": (LlamaFileType.MOSTLY_Q5_K_M, Kind.Q5_K),
    "Q5_1": (LlamaFileType.MOSTLY_Q5_1, Kind.Q5_1),
    "Q5_0": (LlamaFileType.MOSTLY_Q5_0, Kind.Q5_0),
    "Q4_K_M": (LlamaFileType.MOSTLY_Q4_K_M, Kind.Q4_K),
    "Q4_1": (LlamaFileType.MOSTLY_Q4_1, Kind.Q4_1),
    "Q4_0": (LlamaFileType.MOSTLY_Q4_0, Kind.Q4_0),
}
# A block of the K types has 256 weights of one row; rows that are no multiple get the type that llama.cpp takes.
WITHOUT_K: Final = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
LAYER: Final = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Mix:
    """What decides about the types of the tensors of one model.

    Attributes:
        file_type: Name of the file's type, e.g. `Q4_K_M`.
        num_layers: Layers of the model.
        num_experts: Experts of each layer, 0 where there are none.
        has_output: Whether the output head is a separate tensor.
    """

    file_type: str
    num_layers: int
    num_experts: int
    has_output: bool

    @property
    def id(self) -> LlamaFileType:
        """llama.cpp's number of the file type."""
        return FILE_TYPES[self.file_type][0]

    def kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        """Return the type of a tensor, by its name in the file and its shape [..., row length]."""
        default = FILE_TYPES[self.file_type][1]
        if len(shape) == 1 or default == Kind.F32 or "_norm." in name or "ffn_gate_inp" in name:
            return Kind.F32
        kind = self._mixed(name, shape, default) if self.file_type.startswith("Q") else default
        if shape[-1] % block_length(kind):
            kind = WITHOUT_K.get(kind, Kind.F16)
        return Kind.F16 if shape[-1] % block_length(kind) else kind

    def _mixed(self, name: str, shape: tuple[int, ...], default: Kind) -> Kind:
        if name == "output.weight" or (name == "token_embd.weight" and not self.has_output):
            if default == Kind.Q8_0 or shape[-1] % block_length(default):
                return Kind.Q8_0
            return Kind.Q6_K
        is_medium = self.file_type.endswith("_K_M")
        more = Kind.Q6_K if is_medium and self._gets_more_bits(name) else default
        if "attn_v." in name or "attn_qkv." in name:
            return Kind.Q8_0 if self.num_experts == 8 else self._of_values(more)
        if "attn_k." in name and self.num_experts == 8:
            return Kind.Q8_0
        if "attn_output." in name and self.num_experts == 8 and self.file_type == "Q4_K_M":
            return Kind.Q5_K
        return more if "ffn_down" in name else default

    def _of_values(self, kind: Kind) -> Kind:
        """Eight heads share the values of a 70B model with 80 layers: more bits for them cost little."""
        return Kind.Q5_K if self.num_layers == 80 and kind == Kind.Q4_K else kind

    def _gets_more_bits(self, name: str) -> bool:
        found = LAYER.match(name)
        layer, eighth = int(found[1]) if found else 0, self.num_layers // 8
        return layer < eighth or layer >= 7 * self.num_layers // 8 or (layer - eighth) % 3 == 2


def check_file_types(names: list[str]) -> None:
    """Refuse a file type that is not known.

    Raises:
        UserError: A name is not in `FILE_TYPES`.
    """
    unknown = [name for name in names if name not in FILE_TYPES]
    if unknown:
        raise UserError(
            f"{', '.join(unknown)} is no type of GGUF file that is written here.",
            f"known are {', '.join(FILE_TYPES)}.",
            "choose some of them: --quantize Q4_K_M,Q8_0.",
        )


def block_length(kind: Kind) -> int:
    """Return the weights in a block of a type."""
    return int(GGML_QUANT_SIZES[kind][0])


def num_bytes(kind: Kind, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor in bytes."""
    length, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape) // length * size)


def quantized(weights: NDArray[np.float32], kind: Kind) -> NDArray[np.uint8]:
    """Return the bytes of a tensor in a type, uint8 [..., bytes of a row]."""
    rows = weights if kind == Kind.F32 else quantize_rows(weights, kind)
    return np.ascontiguousarray(rows).view(np.uint8)
