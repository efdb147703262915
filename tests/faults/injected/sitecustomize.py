"""Faults on demand in the ranks of a launch; Python imports this at start where PYTHONPATH names the folder.

PACKHORSE_FAULT="kind@step:rank"     when that many steps are done, on that rank, in the first attempt only
PACKHORSE_FAULT="kind@step:rank:N"   in the first N attempts

raise, exit, kill, stop    an exception; os._exit(0); SIGKILL; SIGSTOP
oom                        torch.OutOfMemoryError
nan_loss, nan_gradient     in this rank's first pass of the step
nan_weight                 one number of the first trained weight, from then on
term-PHASE                 SIGTERM to this rank alone, as it names that phase (load, forward, evaluate, save …)
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
from types import ModuleType
from typing import Any

TARGET = "packhorse.train.loop"


class Fault:
    """One fault of one rank, put into the step loop by wrapping what it calls."""

    def __init__(self, words: str) -> None:
        self.kind, _, place = words.partition("@")
        step, rank, *attempts = place.split(":")
        self.step = int(step)
        mine = int(rank) == int(os.environ["RANK"])
        self.is_due = mine and int(os.environ.get("PACKHORSE_ATTEMPT", "1")) <= int(attempts[0] if attempts else 1)

    def install(self, loop: ModuleType) -> None:
        if not self.is_due:
            return
        if self.kind.startswith("term-"):
            self._wrap_phase(loop.Pulse)
        elif self.kind.startswith("nan_"):
            self._wrap_loss(loop)
        else:
            self._wrap_step(loop)

    def _wrap_step(self, loop: ModuleType) -> None:
        seed_step = loop.seed_step

        def strike(seed: int, step: int, rank: int) -> None:
            if step == self.step:
                self._strike()
            seed_step(seed, step, rank)

        loop.seed_step = strike

    def _strike(self) -> None:
        if self.kind == "raise":
            raise RuntimeError("a fault was injected here")
        if self.kind == "exit":
            os._exit(0)
        if self.kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)
        if self.kind == "oom":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (injected)")

    def _wrap_loss(self, loop: ModuleType) -> None:
        seed_step, micro_batch_loss = loop.seed_step, loop.micro_batch_loss

        def watch(seed: int, step: int, rank: int) -> None:
            self.is_due = step == self.step
            seed_step(seed, step, rank)

        def loss(model: Any, *arguments: Any) -> Any:
            if not self.is_due or not model.training:
                return micro_batch_loss(model, *arguments)
            self.is_due = False
            trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            if self.kind == "nan_weight":
                getattr(trained.data, "_local_tensor", trained.data).view(-1)[0] = float("nan")
            if self.kind == "nan_gradient":

                def once(gradient: Any) -> Any:
                    handle.remove()
                    return gradient * float("nan")

                handle = trained.register_hook(once)
            summed = micro_batch_loss(model, *arguments)
            return summed * float("nan") if self.kind == "nan_loss" else summed

        self.is_due = False
        loop.seed_step, loop.micro_batch_loss = watch, loss

    def _wrap_phase(self, pulse: Any) -> None:
        phase, named = pulse.phase, self.kind.removeprefix("term-")

        def then_terminate(self_: Any, name: str, step: int | None = None) -> None:
            phase(self_, name, step)
            if self.is_due and (self_._last.phase, self_._last.step) == (named, self.step):
                self.is_due = False
                os.kill(os.getpid(), signal.SIGTERM)

        pulse.phase = then_terminate


class AfterImport(importlib.abc.MetaPathFinder):
    """Lets the target load as ever, then installs the fault."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def then_install(module: ModuleType) -> None:
            execute(module)
            self._fault.install(module)

        spec.loader.exec_module = then_install  # type: ignore[method-assign]
        return spec


if os.environ.get("PACKHORSE_FAULT") and "RANK" in os.environ:
    sys.meta_path.insert(0, AfterImport(Fault(os.environ["PACKHORSE_FAULT"])))
