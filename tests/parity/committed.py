"""The curves of the loop by hand as they are committed, in curves.json, and the script that makes that file.

    python tests/parity/committed.py        computes all of them and writes curves.json: some minutes

`make test` takes a curve from the file where the libraries and the base model are those that it was made with, byte for
byte; else, on another processor for example, it is computed. `make parity` computes each and compares it with the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from golden import Curve, assert_norms

FILE = Path(__file__).with_name("curves.json")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
LOSS_TOLERANCE = 1e-5
RECOMPUTE = "PARITY_RECOMPUTE"


def committed_curve(key: str, base: str, compute: Callable[[], Curve]) -> Curve:
    """The curve of this name, computed where it must be.

    Args:
        key: Method, base and packing, or what else it is of.
        base: Fingerprint of the base model that it starts from.
        compute: Trains by hand.
    """
    stored = read_file()
    kept = stored["curves"].get(key)
    fits = kept is not None and kept["base"] == base and stored["versions"] == versions()
    if not fits or os.environ.get(RECOMPUTE):
        curve = compute()
        if fits:
            assert curve.losses == pytest.approx(kept["losses"], rel=LOSS_TOLERANCE, abs=0), f"{FILE.name}: {key}"
            assert_norms(curve.norms, Curve(kept["losses"], kept["norms"], kept["untrained"]))
        return curve
    return Curve(kept["losses"], kept["norms"], kept["untrained"])


def fingerprint(weights: Path | dict[str, torch.Tensor]) -> str:
    """Hash of a weights file, or of named tensors."""
    if isinstance(weights, Path):
        return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    parts = (name.encode() + weights[name].numpy().tobytes() for name in sorted(weights))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that a curve depends on, whatever they were built for."""
    return {name: version(name).partition("+")[0] for name in LIBRARIES}


@cache
def read_file() -> dict[str, Any]:
    """The file's `versions` and `curves`; empty where there is none yet."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    return {"versions": {}, "curves": {}} | found


def main() -> None:
    """Computes every curve and writes the file; floats are written so that they are read back unchanged."""
    os.environ.update({RECOMPUTE: "1", "HF_HUB_OFFLINE": "1"})
    torch.set_num_threads(1)
    curves: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, base, curve in _every_curve(Path(folder)):
            curves[key] = {"base": base, **asdict(curve)}
            print(f"{key}: {curve.losses[0]:.4f} to {curve.losses[-1]:.4f}", flush=True)
    lines = [f"{json.dumps(key)}: {json.dumps(curve)}" for key, curve in sorted(curves.items())]
    text = f'{{"versions": {json.dumps(versions())},\n"curves": {{\n' + ",\n".join(lines) + "\n}}\n"
    FILE.write_text(text, encoding="utf-8")


def _every_curve(folder: Path) -> Iterator[tuple[str, str, Curve]]:
    from laboratory import Laboratory
    from test_families import FAMILIES, Families
    from test_families import METHODS as FAMILY_METHODS
    from test_matrix import CELLS
    from test_optimizers import OPTIMIZERS, golden_of

    laboratory = Laboratory(folder)
    for method, base, packing in dict.fromkeys((cell["method"], cell["base"], cell["packing"]) for cell in CELLS):
        yield (
            laboratory.key(method, base, packing),
            laboratory.fingerprint(base),
            laboratory.golden(method, base, packing),
        )
    for name in OPTIMIZERS:
        yield name, laboratory.fingerprint("tiny"), golden_of(name, laboratory)
    families = Families(laboratory)
    for family in FAMILIES:
        for method in FAMILY_METHODS:
            yield families.key(family, method), families.fingerprint(family), families.golden(family, method)[0]


if __name__ == "__main__":
    main()
