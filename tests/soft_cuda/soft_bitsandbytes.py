"""bitsandbytes on soft CUDA: its own Python for CUDA, unchanged, over C functions that compute on the host.

Proves that operands are what that Python accepts and which of its kernels a layer takes; 8-bit products are of 8-bit
weights and 8-bit inputs, as on a GPU. Cannot prove the kernels' rounding, and has none of bitsandbytes' optimizers.
"""

from __future__ import annotations

import ctypes
import logging
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FOUR_BITS = ("nf4", "fp4")
SCALES_PER_BLOCK = 256
"""Scales that share one scale of their own, where those are in 8 bits."""


def install() -> None:
    """Replace the C functions of bitsandbytes in this process."""
    # It looks for a CUDA library, which cannot be loaded without a driver, and says so.
    logging.getLogger("bitsandbytes.cextension").setLevel(logging.CRITICAL)
    from bitsandbytes import functional
    from bitsandbytes.backends.cuda import ops

    ops.lib = functional.lib = SimpleNamespace(**_functions())
    ops._cuda_device_of = functional._cuda_device_of = lambda tensor: nullcontext()
    ops.CUBLAS_Context = SimpleNamespace(get_instance=lambda: SimpleNamespace(get_context=lambda device: 0))


def _functions() -> dict[str, Any]:
    functions: dict[str, Any] = {
        "cint8_vector_quant": _quantize_rows,
        "cigemmlt_32": _int8_product,
        "cdequant_mm_int32_fp16": _dequantize_product,
    }
    for name, dtype in TYPES.items():
        functions[f"cquantize_blockwise_{name}"] = partial(_quantize_8_bit, dtype)
        functions[f"cdequantize_blockwise_{name}"] = partial(_dequantize_8_bit, dtype)
        functions[f"cgemm_4bit_{name}"] = partial(_product_4_bit, dtype)
        for kind in FOUR_BITS:
            functions[f"cquantize_blockwise_{name}_{kind}"] = partial(_quantize_4_bit, dtype, kind)
            functions[f"cdequantize_blockwise_{name}_{kind}"] = partial(_dequantize_4_bit, dtype, kind)
    return functions


def _at(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """Numbers at an address, as a tensor of the host."""
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=count)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _on_host(name: str) -> Any:
    """An operator of bitsandbytes; with tensors of the host it takes the kernel for the CPU."""
    return getattr(torch.ops.bitsandbytes, name)


def _quantize_4_bit(dtype: torch.dtype, kind: str, code: None, source: int, scales: int, out: int, size: int, n: int):
    packed, found = _on_host("quantize_4bit")(_at(source, n, dtype), size, kind, torch.uint8)
    _at(out, packed.numel(), torch.uint8).copy_(packed.view(-1))
    _at(scales, found.numel(), torch.float32).copy_(found)


def _four_bits(dtype: torch.dtype, kind: str, packed: int, scales: Tensor, size: int, shape: list[int]) -> Tensor:
    count = torch.Size(shape).numel()
    source = _at(packed, _blocks(count, 2), torch.uint8).view(-1, 1)
    return _on_host("dequantize_4bit")(source, scales, size, kind, shape, dtype)


def _dequantize_4_bit(
    dtype: torch.dtype, kind: str, code: None, packed: int, scales: int, out: int, size: int, n: int, stream: int
) -> None:
    found = _at(scales, _blocks(n, size), torch.float32)
    _at(out, n, dtype).copy_(_four_bits(dtype, kind, packed, found, size, [n]))


def _quantize_8_bit(dtype: torch.dtype, code: int, source: int, scales: int, out: int, size: int, n: int) -> None:
    levels = _at(code, 256, torch.float32)
    quantized, found = _on_host("quantize_blockwise")(_at(source, n, dtype), levels, size)
    _at(out, n, torch.uint8).copy_(quantized.view(-1))
    _at(scales, found.numel(), torch.float32).copy_(found)


def _eight_bits(dtype: torch.dtype, code: int, source: int, scales: int, size: int, n: int) -> Tensor:
    found = _at(scales, _blocks(n, size), torch.float32)
    levels = _at(code, 256, torch.float32)
    return _on_host("dequantize_blockwise")(_at(source, n, torch.uint8), found, levels, size, dtype).view(-1)


def _dequantize_8_bit(
    dtype: torch.dtype, code: int, source: int, scales: int, out: int, size: int, n: int, stream: int
) -> None:
    _at(out, n, dtype).copy_(_eight_bits(dtype, code, source, scales, size, n))


def _product_4_bit(
    dtype: torch.dtype,
    inputs: int,
    packed: int,
    scales: int,
    scales_8_bit: int | None,
    code: int,
    offset: int,
    out: int,
    bias: int | None,
    rows: int,
    outputs: int,
    width: int,
    size: int,
    kind: int,
    stream: int,
) -> None:
    """Inputs [rows, width] times 4-bit weights [outputs, width]; scales may themselves be in 8 bits."""
    num_scales = _blocks(outputs * width, size)
    if scales_8_bit is None:
        found = _at(scales, num_scales, torch.float32)
    else:
        found = _eight_bits(torch.float32, code, scales_8_bit, scales, SCALES_PER_BLOCK, num_scales)
        found = found + _at(offset, 1, torch.float32)
    weight = _four_bits(dtype, "fp4" if kind == 1 else "nf4", packed, found, size, [outputs, width])
    result = _at(inputs, rows * width, dtype).view(rows, width).float() @ weight.float().T
    if bias is not None:
        result += _at(bias, outputs, dtype)
    _at(out, rows * outputs, dtype).view(rows, outputs).copy_(result)


def _quantize_rows(source: int, out: int, scales: int, threshold: float, rows: int, columns: int, stream: int) -> None:
    numbers = _at(source, rows * columns, torch.float16).view(rows, columns).float()
    largest = numbers.abs().amax(1)
    _at(scales, rows, torch.float32).copy_(largest)
    scaled = numbers * (127 / largest.clamp(min=1e-12))[:, None]
    _at(out, rows * columns, torch.int8).view(rows, columns).copy_(scaled.round())


def _int8_product(
    context: int, m: int, n: int, k: int, weight: int, inputs: int, out: int, scale: None, *_: int
) -> int:
    """Inputs [n, m] times weights [k, m] in int32: cuBLASLt counts columns first."""
    left, right = _at(inputs, n * m, torch.int8).view(n, m), _at(weight, k * m, torch.int8).view(k, m)
    _at(out, n * k, torch.int32).view(n, k).copy_(left.double() @ right.double().T)
    return 0


def _dequantize_product(
    source: int, row_scales: int, column_scales: int, out: int, bias: int | None, rows: int, columns: int, stream: int
) -> None:
    result = _at(source, rows * columns, torch.int32).view(rows, columns).float()
    result *= _at(row_scales, rows, torch.float32)[:, None] * _at(column_scales, columns, torch.float32) / 127**2
    if bias is not None:
        result += _at(bias, columns, torch.float16)
    _at(out, rows * columns, torch.float16).view(rows, columns).copy_(result)
