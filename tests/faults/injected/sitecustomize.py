"""Faults on demand in the ranks of a launch; Python imports this at start where PYTHONPATH names the folder.

PACKHORSE_FAULT="kind@step:rank"     when that many steps are done, on that rank, in the first attempt only
PACKHORSE_FAULT="kind@step:rank:N"   in the first N attempts
PACKHORSE_FAULT_FILE=FILE            at the next step once FILE holds "kind:rank"; it is removed
PACKHORSE_HOLD_FILE=FILE             while FILE stands and holds "PHASE:rank:step", that rank is held where it names
                                     that phase with so many steps done, or more; FILE.held says that it is. `publish`:
                                     rank 0, when all of a checkpoint is written and its name is still that of a draft

raise, exit, kill, stop    an exception; os._exit(0); SIGKILL; SIGSTOP
sleep                      for ever
oom                        torch.OutOfMemoryError
nan_loss, nan_gradient     in this rank's first pass of the step
nan_weight                 one number of the first trained weight, from then on
nan_layer                  in the backward pass of the first decoder layer, from then on
term-PHASE                 SIGTERM to this rank alone, as it names that phase (load, forward, evaluate, save …)
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

TARGET = "packhorse.train.loop"


class Fault:
    """Puts faults into the step loop by wrapping what it calls."""

    def __init__(self, words: str, asked: Path | None, holds: Path | None = None) -> None:
        """Reads `kind@step:rank[:attempts]`; `asked`, `holds`: files that are looked for while it runs."""
        self._rank = int(os.environ["RANK"])
        self._asked, self._holds = asked, holds
        self._kind, self._step, self._is_due = "", -1, False
        if words:
            self._kind, _, place = words.partition("@")
            step, rank, *attempts = place.split(":")
            if self._rank == int(rank) and int(os.environ.get("PACKHORSE_ATTEMPT", "1")) <= int((attempts or [1])[0]):
                self._step = int(step)

    def install(self, loop: ModuleType) -> None:
        objective = sys.modules["packhorse.train.objectives.objective"]
        seed_step, micro_batch_loss, phase = loop.seed_step, objective.micro_batch_loss, loop.HeartbeatWriter.phase

        def at_step(seed: int, step: int, rank: int) -> None:
            if self._is_asked():
                self._step = step
            self._is_due = step == self._step
            if self._is_due:
                self._strike()
            seed_step(seed, step, rank)

        def loss(model: Any, *arguments: Any) -> Any:
            if not self._is_due or not model.training or not self._kind.startswith("nan_"):
                return micro_batch_loss(model, *arguments)
            self._is_due = False
            if self._kind == "nan_weight":
                self._spoil(next(parameter for parameter in model.parameters() if parameter.requires_grad))
            if self._kind == "nan_layer":
                layer = next(each for each in model.modules() if type(each).__name__.endswith("DecoderLayer"))
                layer.mlp.register_full_backward_hook(lambda _, given, __: tuple(each * float("nan") for each in given))
            summed = micro_batch_loss(model, *arguments)
            if self._kind == "nan_gradient":
                # Of the loss: an engine that shards parameters brings the gradient to others than these.
                summed.register_hook(lambda gradient: gradient * float("nan"))
            return summed * float("nan") if self._kind == "nan_loss" else summed

        def at_phase(pulse: Any, name: str, step: int | None = None) -> None:
            phase(pulse, name, step)
            self._hold(pulse._last.phase, pulse._last.step)
            if self._kind == f"term-{pulse._last.phase}" and pulse._last.step == self._step:
                self._kind = ""
                os.kill(os.getpid(), signal.SIGTERM)

        checkpoint = sys.modules["packhorse.train.checkpoint.checkpoints"]
        publish = checkpoint.publish_checkpoint

        def at_publish(temporary: Path, facts: Any) -> None:
            self._hold("publish", facts.step)
            publish(temporary, facts)

        checkpoint.publish_checkpoint = at_publish
        loop.seed_step, objective.micro_batch_loss, loop.HeartbeatWriter.phase = at_step, loss, at_phase

    def _hold(self, phase: str, step: int) -> None:
        try:
            wanted, rank, least = self._holds.read_text().split(":") if self._holds else ("", "-1", "0")
        except FileNotFoundError:
            return
        if self._holds is None or (wanted, int(rank)) != (phase, self._rank) or step < int(least):
            return
        held = self._holds.with_suffix(".held")
        held.touch()
        while self._holds.exists():
            time.sleep(0.02)
        held.unlink(missing_ok=True)

    def _is_asked(self) -> bool:
        if self._asked is None or not self._asked.exists():
            return False
        kind, rank = self._asked.read_text().split(":")
        if int(rank) != self._rank:
            return False
        self._asked.unlink()
        self._kind = kind
        return True

    def _strike(self) -> None:
        if self._kind == "raise":
            raise RuntimeError("a fault was injected here")
        if self._kind == "exit":
            os._exit(0)
        if self._kind == "sleep":
            time.sleep(1e6)
        if self._kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self._kind == "kill" else signal.SIGSTOP)
        if self._kind == "oom":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (injected)")

    def _spoil(self, trained: Any) -> None:
        held = getattr(trained, "ds_tensor", trained).data  # under ZeRO-3 and FSDP2 this rank's part
        getattr(held, "_local_tensor", held).view(-1)[0] = float("nan")


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


VARIABLES = ("PACKHORSE_FAULT", "PACKHORSE_FAULT_FILE", "PACKHORSE_HOLD_FILE")
if "RANK" in os.environ and any(map(os.environ.get, VARIABLES)):
    words, *files = (os.environ.get(name, "") for name in VARIABLES)
    sys.meta_path.insert(0, AfterImport(Fault(words, *(Path(file) if file else None for file in files))))
