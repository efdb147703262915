"""Waits of the host for the device, as a rank writes them: one line of JSON with kind, phase, step and stack each.

Proves that a line of code makes the host wait; how long it waits is known on a GPU only.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import soft_device

SHOWN = ("/packhorse/", "/accelerate/", "/transformers/", "/peft/", "/bitsandbytes/", "/deepspeed/")


@dataclass(frozen=True)
class Wait:
    """A wait of the host for the device.

    Attributes:
        kind: Operator or copy.
        phase: Phase of the heartbeat, such as forward.
        step: Optimizer steps done.
        stack: Innermost calls that are not torch's, as `file:line function`.
    """

    kind: str
    phase: str
    step: int
    stack: tuple[str, ...]


def record_waits(run: Path, rank: int) -> None:
    """Record each wait of this process from now on."""
    from packhorse.run_folder.heartbeat import HeartbeatWriter

    phase, step, original = "start", 0, HeartbeatWriter.phase
    file = _file(run, rank).open("a", encoding="utf-8")

    def note_phase(writer: HeartbeatWriter, name: str, *words: int) -> None:
        nonlocal phase, step
        original(writer, name, *words)
        phase, step = writer.last.phase, writer.last.step

    def note_wait(kind: str) -> None:
        calls = [call for call in traceback.extract_stack()[:-1] if any(part in call.filename for part in SHOWN)]
        shown = [f"{call.filename.split('/packhorse/')[-1]}:{call.lineno} {call.name}" for call in reversed(calls[-3:])]
        file.write(json.dumps([kind, phase, step, shown]) + "\n")
        file.flush()

    HeartbeatWriter.phase = note_phase
    soft_device.on_wait(note_wait)


def waits_of(run: Path, rank: int = 0) -> Iterator[Wait]:
    """The waits of a rank, in order."""
    for line in _file(run, rank).read_text(encoding="utf-8").splitlines():
        kind, phase, step, stack = json.loads(line)
        yield Wait(kind, phase, step, tuple(stack))


def _file(run: Path, rank: int) -> Path:
    return run / f"waits-{rank}.jsonl"
