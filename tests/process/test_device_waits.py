"""How often the step loop waits for the device: once per step, and never in a pass or a layer.

Counted on the CPU, where nothing waits, by the calls that would wait on a GPU: those that turn a tensor into a number
or copy it to the host.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from packhorse.run_folder.heartbeat import HeartbeatWriter
from packhorse.train import worker
from packhorse.train.ranks.signals import StopRequest
from ranks import planned
from tiny import write_tiny

STEPS, PASSES = 4, 2
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"}
"""Operators whose result, or its size, the host must know."""
TO_THE_HOST = ("tolist", "cpu")
"""Methods of a tensor that call no operator where it is on the CPU already."""


class Census(TorchDispatchMode):
    """Counts waits by the phase of the heartbeat; only in the thread that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self._phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            self.waits[self._phase] += 1
        return func(*args, **(kwargs or {}))

    def watch(self, phase: Callable[..., None]) -> Callable[..., None]:
        def entered(pulse: HeartbeatWriter, name: Any, step: int | None = None) -> None:
            self._phase = name
            self.phases[name] += 1
            phase(pulse, name, step)

        return entered

    def watch_method(self, method: Callable[..., Any]) -> Callable[..., Any]:
        trains = threading.get_ident()

        def called(tensor: torch.Tensor, *arguments: Any) -> Any:
            self.waits[self._phase] += threading.get_ident() == trains
            return method(tensor, *arguments)

        return called


def count_waits(run: Path, result: Path) -> None:
    census, train = Census(), worker.train
    HeartbeatWriter.phase = census.watch(HeartbeatWriter.phase)  # type: ignore[method-assign]

    def counted(*arguments: Any) -> Any:
        for name in TO_THE_HOST:
            setattr(torch.Tensor, name, census.watch_method(getattr(torch.Tensor, name)))
        census.phases.clear()
        with census:
            return train(*arguments)

    def record(*_: Any) -> int:
        figures = {"waits": census.waits, "phases": census.phases}
        result.write_text(json.dumps({**figures, "deterministic": torch.are_deterministic_algorithms_enabled()}))
        os._exit(0)

    worker.train, worker._end = counted, record  # type: ignore[assignment]
    worker.run_worker(run / "plan.json", StopRequest())


@pytest.mark.parametrize(("optimizer", "waits"), [("adamw", 1), ("muon", 2)])
def test_the_device_is_waited_for_after_the_optimizer_is_queued(optimizer: str, waits: int, tmp_path: Path) -> None:
    recipe = write_tiny(
        tmp_path,
        deterministic=True,
        steps=STEPS,
        batch={"length": 256, "packs": 2 * PASSES, "micro": 2},
        optimizer={"learning_rate": 1e-2, "name": optimizer},
        data={"sources": [{"path": "builtin:core.messages.jsonl", "rows": 300}], "split": {"train": 1.0}},
    )
    result = tmp_path / "counted.json"
    child = mp.get_context("spawn").Process(target=count_waits, args=(planned(recipe, "counted"), result))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == 0
    found = json.loads(result.read_text(encoding="utf-8"))
    assert {name: found["phases"][name] for name in ("forward", "backward", "optimizer")} == {
        "forward": STEPS * PASSES,
        "backward": STEPS * PASSES,
        "optimizer": STEPS,
    }
    in_steps = {name: count for name, count in found["waits"].items() if count and name != "save"}
    assert in_steps == {"optimizer": waits * STEPS}
    assert found["deterministic"]
