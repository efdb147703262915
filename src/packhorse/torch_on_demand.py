"""Import libraries that import torch without its two seconds: torch is then imported when it is first used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextmanager
def torch_on_demand() -> Iterator[None]:
    """Give the modules that are imported inside a stand-in for torch, which imports torch at the first use of a name.

    transformers imports torch for every tokenizer, whose work needs none of it.
    """
    spec = None if "torch" in sys.modules else find_spec("torch")
    if spec is None:
        yield
        return
    stand_in = _Torch("torch")
    stand_in.__spec__ = spec  # transformers looks for it, to see whether torch is installed
    sys.modules["torch"] = stand_in
    try:
        yield
    finally:
        stand_in.leave()


class _Torch(ModuleType):
    """Stand-in for torch; its names are those of torch."""

    def leave(self) -> None:
        """Let the next `import torch` find torch."""
        if sys.modules.get("torch") is self:
            del sys.modules["torch"]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        self.leave()
        return getattr(import_module("torch"), name)
