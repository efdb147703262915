"""One rank's share of a checkpoint, and the thread that writes it while training continues.

The step loop waits only for a copy in host memory. Tensors are assigned to the ranks by size (saved_tensor.py), so that
each copies and writes its share:

    rank 0    adapter/, the small files, and its share of the rest
    rank r    model/model-*.safetensors, optimizer-0000r-*.safetensors

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

from packhorse.run_folder.checkpoints.manifest import bring_to_disk, files_below
from packhorse.run_folder.checkpoints.publishing import not_shared_error, write_file_list
from packhorse.train.checkpoint.saved_tensor import FileTensors, SavedFile

NICENESS: Final = 5
WAIT_SECONDS: Final = 1.0


@dataclass(frozen=True)
class RankShare:
    """What one rank writes of a checkpoint.

    Attributes:
        folder: Temporary folder of the checkpoint; exists.
        rank: Rank of this process.
        files: Files with their tensors. While tensors are still sharded, taking the next one is a collective.
        folders: Name of a subfolder to the function that writes it.
        texts: Name of a small file to the function that returns its text; called last.
    """

    folder: Path
    rank: int
    files: Iterable[tuple[SavedFile, FileTensors]]
    folders: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    texts: Mapping[str, Callable[[], str]] = field(default_factory=dict)

    def write(self) -> None:
        """Write the share to disk, read it back, and leave the record that says so.

        Raises:
            OSError: The disk refuses, or returns something else.
            SafetensorError: The same, from inside safetensors.
            UserError: The files differ from what was to be written, or the folder is not shared by all nodes.
        """
        files = iter(self.files)
        try:
            self._write(files)
        finally:
            # Taking a file is a collective: after an error here the other ranks still wait for this one.
            for _ in files:
                pass

    def _write(self, files: Iterator[tuple[SavedFile, FileTensors]]) -> None:
        if not self.folder.is_dir():
            raise not_shared_error(self.folder, self.rank, self.rank + 1)
        written: list[Path] = []
        for name, write in self.folders.items():
            write(self.folder / name)
            written += files_below(self.folder / name)
        for file, tensors in files:
            written += file.write(self.folder / file.name, tensors)
            del tensors  # before those of the next file are gathered
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
