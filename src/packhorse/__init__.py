"""Packhorse fine-tunes language models from a laptop to a Slurm cluster; this is its Python API.

`import packhorse` is cheap: each function imports what it needs when it is called. See docs/python-api.md.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packhorse.errors import UserError
    from packhorse.workflows.api import (
        RunFailedError,
        check,
        evaluate,
        load_recipe,
        open_run,
        plan,
        prepare,
        resume,
        train,
    )
    from packhorse.workflows.run import Run

__all__ = [
    "Run",
    "RunFailedError",
    "UserError",
    "check",
    "evaluate",
    "load_recipe",
    "open_run",
    "plan",
    "prepare",
    "resume",
    "train",
]


class _CallablePackage(ModuleType):
    """A package that has the name of a function of the API: `packhorse.plan(...)` calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module("packhorse.workflows.api"), name)(*args, **kwargs)


# Python binds the name of a sub-package when anything in it is imported, which would replace a function of that name.
for _name in ("evaluate", "plan", "train"):
    import_module(f"packhorse.{_name}").__class__ = _CallablePackage


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in __all__:
        raise AttributeError(f"module 'packhorse' has no attribute {name!r}")
    return getattr(import_module("packhorse.errors" if name == "UserError" else "packhorse.workflows.api"), name)
