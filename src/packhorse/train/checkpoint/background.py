"""Saving beside training: the step loop waits for a copy in host memory, and a thread of each rank brings it to disk.

Tensors are dealt to the ranks by size, so that each copies and writes its share and none waits for another:

    rank 0    model/ or adapter/, the small files, and what is left of its share of the optimizer's states
    rank r    optimizer-0000r-*.safetensors

safetensors, as of 0.8, writes without holding Python's lock, so that training goes on meanwhile.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from safetensors.torch import save_file
from torch import Tensor

from packhorse.run_folder.checkpoints.manifest import bring_to_disk, files_below
from packhorse.run_folder.checkpoints.publishing import not_shared_error, write_file_list
from packhorse.run_folder.layout import optimizer_tensors_name

LARGEST_FILE_BYTES: Final = 4 * 2**30
"""Of states of the optimizer; one tensor that is larger has a file of its own."""
NICENESS: Final = 5
LOOK_SECONDS: Final = 1.0

Part = dict[str, Tensor]
"""Tensors of one file, on the CPU."""

Others = dict[str, int | float | bool]
"""States of the optimizer that are no tensors, by key."""


def fresh_copy(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and of nobody else."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def dealt(
    states: Iterable[tuple[str, Tensor | float]], loads: list[int], others: Others
) -> Iterator[tuple[str, Tensor, int]]:
    """Each tensor with the rank that writes it: the one that has least to write so far.

    The same on all ranks, since all see all of them.

    Args:
        states: From `optimizer_state.gather_states`; taken to its end, which is a collective.
        loads: Bytes that each rank has to write already; added to.
        others: Filled with the states that are no tensors.
    """
    for key, value in states:
        if not isinstance(value, Tensor):
            others[key] = value
            continue
        owner = loads.index(min(loads))
        loads[owner] += value.nbytes
        yield key, value, owner


def in_files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Part]:
    """What goes into a file each, as it comes."""
    part: Part = {}
    part_bytes = 0
    for key, value in tensors:
        if part and part_bytes + value.nbytes > LARGEST_FILE_BYTES:
            yield part
            part, part_bytes = {}, 0
        part[key] = value
        part_bytes += value.nbytes
    if part:
        yield part


@dataclass(frozen=True)
class Share:
    """What one rank writes of a checkpoint.

    Attributes:
        folder: The checkpoint's temporary folder; exists.
        rank: This one.
        parts: Of the optimizer's states. Where they are still to be gathered, taking the next is a collective.
        gather: Puts together what `folders` write; a collective where there is anything to put together.
        folders: Writers of whole folders below, by name.
        texts: Makers of small files, by name; asked last.
    """

    folder: Path
    rank: int
    parts: Iterable[Part]
    gather: Callable[[], None] = lambda: None
    folders: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    texts: Mapping[str, Callable[[], str]] = field(default_factory=dict)

    def write(self) -> None:
        """Writes it all, brings it to disk, reads it back, and leaves the record that says so.

        Raises:
            OSError: The disk refuses, or gives back something else.
            SafetensorError: The same, from within safetensors.
            UserError: What was written is not what was to be written, or the folder is not shared by all nodes.
        """
        self.gather()
        parts = iter(self.parts)
        try:
            self._write(parts)
        finally:
            for _ in parts:  # the other ranks wait for this one to gather what is left
                pass

    def _write(self, parts: Iterator[Part]) -> None:
        if not self.folder.is_dir():
            raise not_shared_error(self.folder, self.rank, self.rank + 1)
        written: list[Path] = []
        for name, write in self.folders.items():
            write(self.folder / name)
            written += files_below(self.folder / name)
        for number, part in enumerate(parts, start=1):
            file = self.folder / optimizer_tensors_name(self.rank, number)
            save_file(part, file)
            written.append(file)
        for name, text in self.texts.items():
            (self.folder / name).write_text(text(), encoding="utf-8")
            written.append(self.folder / name)
        write_file_list(self.folder, self.rank, bring_to_disk(self.folder, written))


class Background:
    """A thread for one piece of work at a time; what it raises is kept until it is asked for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is being worked on."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Begins; the piece before must be done."""
        assert self.done
        self._thread = threading.Thread(target=self._in_thread, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        """The same, but in this thread: it is done when this returns."""
        assert self.done
        self._run(work)

    def wait(self, still_alive: Callable[[], None]) -> None:
        """Waits until it is done, and says about every second that it still waits."""
        while self._thread is not None and not self.done:
            self._thread.join(LOOK_SECONDS)
            still_alive()

    def take_error(self) -> Exception | None:
        """What the last piece of work raised, once."""
        error, self._error = self._error, None
        return error

    def _in_thread(self, work: Callable[[], None]) -> None:
        if sys.platform == "linux":  # there, threads have priorities of their own: training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        self._run(work)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error
