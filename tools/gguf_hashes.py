"""Make tests/unit/export/gguf_hashes.json: hashes of the tensors that llama.cpp's own quantisation writes.

python tools/gguf_hashes.py FOLDER

FOLDER holds libllama and libggml: unpack the npm package `@node-llama-cpp/linux-x64` (`npm pack`, then `tar xzf`) and
give its `bins/linux-x64`. The models are those of tests/gguf_models.py; their f32 files are ours.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path

from gguf_models import QUANTIZED, f32_file, hash_of, write_model
from packhorse.export.gguf.file_types import FILE_TYPES

ROOT = Path(__file__).resolve().parents[1]
HASHES = ROOT / "tests" / "unit" / "export" / "gguf_hashes.json"


class _Parameters(ctypes.Structure):
    """Begin of llama.cpp's `llama_model_quantize_params`, and room for the rest."""

    _fields_ = (("threads", ctypes.c_int32), ("file_type", ctypes.c_int32), ("rest", ctypes.c_byte * 512))


def quantize(libraries: Path, source: Path, target: Path, file_type: int) -> None:
    """Let llama.cpp write a file of another type."""
    process = os.fork()  # its log and its memory end with the process
    if process == 0:
        base, ggml, llama = (next(libraries.glob(f"{name}*.so")) for name in ("libggml-base", "libggml.", "libllama."))
        ctypes.CDLL(str(base), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(ggml), mode=ctypes.RTLD_GLOBAL).ggml_backend_load_all_from_path(str(libraries).encode())
        library = ctypes.CDLL(str(llama), mode=ctypes.RTLD_GLOBAL)
        library.llama_model_quantize_default_params.restype = _Parameters
        library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
        parameters = library.llama_model_quantize_default_params()
        parameters.threads, parameters.file_type = 1, file_type
        words = (str(source).encode(), str(target).encode(), ctypes.byref(parameters))
        os._exit(library.llama_model_quantize(*words))
    if os.waitpid(process, 0)[1]:
        raise RuntimeError(f"llama.cpp could not write {target.name}")


def main(libraries: Path) -> None:
    """Write the hashes."""
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in QUANTIZED.items():
            folder = Path(scratch) / name
            write_model(config, folder)
            source = f32_file(folder)
            for file_type, (number, _) in FILE_TYPES.items():
                if file_type != "F32":
                    target = folder / "theirs.gguf"
                    quantize(libraries, source, target, int(number))
                    found.setdefault(name, {})[file_type] = hash_of(target)
    HASHES.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main(Path(sys.argv[1]).resolve())
