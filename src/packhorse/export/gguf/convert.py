"""Write a model in Hugging Face form as a GGUF file, one tensor in memory at a time."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from transformers import AutoConfig, PretrainedConfig

from packhorse.errors import UserError
from packhorse.export.gguf.families import Weights, family_of, rope_factors, write_parameters
from packhorse.export.gguf.file_types import Mix, num_bytes, quantized
from packhorse.export.gguf.vocabulary import Vocabulary
from packhorse.export.reference import first_layers
from packhorse.export.weight_files import WeightFiles

EXPERT: Final = re.compile(r"\.experts\.(\d+)\.")
LAYER: Final = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file, not read yet."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Weights]


@dataclass(frozen=True)
class Source:
    """A model in Hugging Face form.

    Attributes:
        folder: Folder with config.json and safetensors files.
        config: Its configuration.
    """

    folder: Path
    config: PretrainedConfig

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Read the configuration; nothing else.

        Raises:
            UserError: llama.cpp does not run such a model.
        """
        config = AutoConfig.from_pretrained(folder)
        family_of(config)
        return cls(folder, config)

    @property
    def num_experts(self) -> int:
        """Experts of each layer, 0 where there are none."""
        return getattr(self.config, "num_local_experts", 0) or getattr(self.config, "num_experts", 0) or 0

    @property
    def fp32_bytes(self) -> int:
        """Size of the weights in fp32."""
        return 4 * sum(math.prod(tensor.shape) for tensor in self.tensors())

    def tensors(self, num_layers: int | None = None) -> list[Tensor]:
        """Return the tensors of the file, of the first layers only if `num_layers` is given.

        Raises:
            UserError: A weight has no place in the file, or a file is missing.
        """
        return [*self._factors(), *self._weights(WeightFiles(self.folder), num_layers)]

    def _factors(self) -> Iterator[Tensor]:
        for name, factors in rope_factors(self.config).items():
            yield Tensor(name, factors.shape, lambda factors=factors: factors)  # type: ignore[misc]

    def _weights(self, files: WeightFiles, num_layers: int | None) -> Iterator[Tensor]:
        family = family_of(self.config)
        names = get_tensor_name_map(family.architecture, self.config.num_hidden_layers)
        experts: dict[str, dict[int, str]] = {}
        for name in sorted(files.names(), key=_by_layer):
            if (self.config.tie_word_embeddings and name == "lm_head.weight") or _is_above(name, num_layers):
                continue
            expert = EXPERT.search(name)
            stacked = EXPERT.sub(".experts.", name)
            target = names.get_name(stacked, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise UserError(
                    f"the weight {name} has no place in a GGUF file of a {self.config.architectures[0]}.",
                    "a file without it would not be this model.",
                    "export it as a Hugging Face folder: packhorse export RUN.",
                )
            if expert is None:
                read = lambda name=name: family.change(name, files.read(name).float().numpy(), self.config)  # noqa: E731
                yield Tensor(target, files.shape(name), read)
                continue
            parts = experts.setdefault(target, {})
            parts[int(expert[1])] = name
            if len(parts) == self.num_experts:
                ordered = [parts[index] for index in range(len(parts))]
                read = lambda ordered=ordered: np.stack([files.read(part).float().numpy() for part in ordered])  # noqa: E731
                yield Tensor(target, (len(ordered), *files.shape(name)), read)


def _by_layer(name: str) -> tuple[int, str]:
    found = LAYER.search(name)
    return (int(found[1]) if found else -1, name)


def _is_above(name: str, num_layers: int | None) -> bool:
    found = LAYER.search(name)
    return num_layers is not None and found is not None and int(found[1]) >= num_layers


def write_gguf(
    source: Source,
    vocabulary: Vocabulary,
    file_type: str,
    target: Path,
    facts: Mapping[str, str],
    num_layers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Kind]:
    """Write the file; it is on disk when this returns.

    Args:
        source: Model to write.
        vocabulary: Its tokenizer.
        file_type: Name of a type, e.g. `Q4_K_M`.
        target: Path of the file; replaced if it exists.
        facts: Strings of the file's `general` section by name: name, description, license, ...
        num_layers: Write the first layers only; None: all.
        progress: Called with the bytes written so far and in all.

    Returns:
        Type of each tensor, by its name in the file.
    """
    config = source.config
    if num_layers is not None:
        config = first_layers(config, num_layers)
    tensors = source.tensors(num_layers)
    mix = Mix(
        file_type, config.num_hidden_layers, source.num_experts, any(one.name == "output.weight" for one in tensors)
    )
    writer = GGUFWriter(target, MODEL_ARCH_NAMES[family_of(config).architecture])
    writer.add_type("model")
    for name, text in facts.items():
        writer.add_string(f"general.{name}", text)
    writer.add_file_type(mix.id)
    writer.add_quantization_version(2)
    write_parameters(writer, config)
    vocabulary.write(writer)
    kinds = {tensor.name: mix.kind(tensor.name, tensor.shape) for tensor in tensors}
    sizes = {tensor.name: num_bytes(kinds[tensor.name], tensor.shape) for tensor in tensors}
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), sizes[tensor.name], raw_dtype=kinds[tensor.name]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(sizes.values())
    for tensor in tensors:
        writer.write_tensor_data(quantized(tensor.read(), kinds[tensor.name]))
        done += sizes[tensor.name]
        progress(done, total)
    writer.close()
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return kinds
