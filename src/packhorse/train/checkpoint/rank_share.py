"""One rank's share of a checkpoint, and the thread that writes it while training continues.

The step loop waits only for a copy in host memory. Tensors are assigned to the ranks by size, so that each copies and
writes its share and no rank waits for another:

    rank 0    model/ or adapter/, the small files, and the rest of its share of the optimizer's states
    rank r    optimizer-0000r-*.safetensors

safetensors, as of 0.8, writes without holding Python's lock, so that training continues meanwhile.
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

MAX_FILE_BYTES: Final = 4 * 2**30
"""Most bytes of optimizer states in one file; a larger tensor has its own file."""
NICENESS: Final = 5
WAIT_SECONDS: Final = 1.0

FileTensors = dict[str, Tensor]
"""Tensors of one file, on the CPU."""

PlainStates = dict[str, int | float | bool]
"""States of the optimizer that are not tensors, by key."""


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU that shares no memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def assign_to_ranks(
    states: Iterable[tuple[str, Tensor | float]], loads: list[int], plain: PlainStates
) -> Iterator[tuple[str, Tensor, int]]:
    """Yield each tensor with the rank that writes it: the one with the fewest bytes so far.

    Equal on all ranks, since all of them see all states.

    Args:
        states: States from `optimizer_state.gather_states`; consumed to the end, which is a collective.
        loads: Bytes that each rank writes already; added to.
        plain: Filled with the states that are not tensors.
    """
    for key, value in states:
        if not isinstance(value, Tensor):
            plain[key] = value
            continue
        owner = loads.index(min(loads))
        loads[owner] += value.nbytes
        yield key, value, owner


def split_into_files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[FileTensors]:
    """Yield the tensors of one file after another, in their order."""
    part: FileTensors = {}
    part_bytes = 0
    for key, value in tensors:
        if part and part_bytes + value.nbytes > MAX_FILE_BYTES:
            yield part
            part, part_bytes = {}, 0
        part[key] = value
        part_bytes += value.nbytes
    if part:
        yield part


@dataclass(frozen=True)
class RankShare:
    """What one rank writes of a checkpoint.

    Attributes:
        folder: Temporary folder of the checkpoint; exists.
        rank: Rank of this process.
        parts: Files of optimizer states. While states are still sharded, taking the next one is a collective.
        gather: Gathers what `folders` write; a collective while weights are still sharded.
        folders: Name of a subfolder to the function that writes it.
        texts: Name of a small file to the function that returns its text; called last.
    """

    folder: Path
    rank: int
    parts: Iterable[FileTensors]
    gather: Callable[[], None] = lambda: None
    folders: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    texts: Mapping[str, Callable[[], str]] = field(default_factory=dict)

    def write(self) -> None:
        """Write the share to disk, read it back, and leave the record that says so.

        Raises:
            OSError: The disk refuses, or returns something else.
            SafetensorError: The same, from inside safetensors.
            UserError: The files differ from what was to be written, or the folder is not shared by all nodes.
        """
        self.gather()
        parts = iter(self.parts)
        try:
            self._write(parts)
        finally:
            # Taking a part is a collective: after an error here the other ranks still wait for this one.
            for _ in parts:
                pass

    def _write(self, parts: Iterator[FileTensors]) -> None:
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


class BackgroundTask:
    """A thread for one task at a time; its exception is kept for `take_error`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether no task is running."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, task: Callable[[], None]) -> None:
        """Run a task in a thread; the one before must be done."""
        assert self.done
        self._thread = threading.Thread(target=self._in_thread, args=(task,), name="checkpoint", daemon=True)
        self._thread.start()

    def run(self, task: Callable[[], None]) -> None:
        """Run a task in this thread; it is done when this returns."""
        assert self.done
        self._run(task)

    def wait(self, still_alive: Callable[[], None]) -> None:
        """Wait until the task is done, calling `still_alive` about every second."""
        while self._thread is not None and not self.done:
            self._thread.join(WAIT_SECONDS)
            still_alive()

    def take_error(self) -> Exception | None:
        """Return what the last task raised, once."""
        error, self._error = self._error, None
        return error

    def _in_thread(self, task: Callable[[], None]) -> None:
        if sys.platform == "linux":  # where threads have their own priority: training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        self._run(task)

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:
            self._error = error
