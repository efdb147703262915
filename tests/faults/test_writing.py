"""Whatever breaks while a checkpoint is written: the reader sees the old ones or the new one, never a mix."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_disk import need_small_disks, python_on_small_disk, train_with_small_checkpoints

from cli import curve
from packhorse.errors import EXIT_DISK, UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints import listing
from packhorse.run_folder.checkpoints.listing import (
    checkpoints_in,
    complete_checkpoints,
    find_newest_sound,
    prune_checkpoints,
    remove_unfinished,
)
from packhorse.run_folder.checkpoints.manifest import checkpoint_faults
from packhorse.run_folder.layout import step_folder_name
from packhorse.train.state import TrainState
from saving_cases import Trainer, make_run, save_at
from tiny import write_tiny

# A child of this process writes, and is killed; it has one thread when it begins.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

Fault = Callable[[str], None]
NEVER_STRUCK, WENT_ON, FAILED = 10, 11, 12
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


class Events:
    """Everything that a save does to the disk, counted; the fault strikes just before the event of its number.

    Files opened to write, renames, new and removed names come from Python's audit events (PEP 578), which no code can
    pass by. What has none is wrapped: fsync, what safetensors writes, and our own texts. Of a file that is written so,
    half is there at a further event.
    """

    def __init__(self, folder: Path, strike_at: int, fault: Fault) -> None:
        self.count = 0
        self._folder, self._strike_at, self._fault = str(folder), strike_at, fault
        sys.addaudithook(self._audit)
        fsync, serialize, write_text = os.fsync, safetensors.torch.serialize_file, Path.write_text

        def watched_fsync(descriptor: int) -> None:
            self._happens("fsync")
            fsync(descriptor)

        def watched_serialize(tensors: Any, file: Path, **metadata: Any) -> None:
            self._happens(f"write {file}")
            serialize(tensors, file, **metadata)
            whole = Path(file).read_bytes()
            self._half_written(Path(file), whole)

        def watched_text(file: Path, text: str, **settings: Any) -> int:
            done = write_text(file, text, **settings)
            self._half_written(file, text.encode())
            return done

        os.fsync = watched_fsync  # type: ignore[assignment]
        safetensors.torch.serialize_file = watched_serialize
        Path.write_text = watched_text  # type: ignore[method-assign, assignment]

    def _half_written(self, file: Path, whole: bytes) -> None:
        with file.open("r+b") as opened:
            opened.truncate(len(whole) // 2)
            opened.flush()
            self._happens(f"write half of {file}")
            opened.seek(0)
            opened.write(whole)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if str(path).startswith(self._folder) and flags & WRITES and mode != "r+":
                self._happens(f"open {path}")
        elif event in CHANGES:
            # Relative to an open folder: shutil removes so.
            path = str(arguments[0])
            if path.startswith(self._folder) or (not path.startswith("/") and arguments[-1] != -1):
                self._happens(f"{event} {path}")

    def _happens(self, what: str) -> None:
        self.count += 1
        if self.count == self._strike_at:
            self._fault(what)


def die(_: str) -> None:
    os._exit(99)


def refuse(number: int) -> Fault:
    def fault(what: str) -> None:
        raise OSError(number, os.strerror(number), what)

    return fault


def in_child(work: Callable[[], int]) -> int:
    """Runs it in a child and returns its exit code; a traceback is code 70."""
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
            code = 70
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path: Path, one_thread: None) -> tuple[RunPlan, Trainer]:
    """A run at step 6 with checkpoints of steps 2 and 4; saving removes that of step 2."""
    plan = make_run(tmp_path / "runs")
    trainer = Trainer(plan)
    for step in (2, 4):
        save_at(trainer, step)
    trainer.steps_to(6)
    return plan, trainer


def again(plan: RunPlan, kept: Path) -> Path:
    """The run's checkpoints as they were."""
    folder = Path(plan.run_folder) / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_at_any_write_fsync_or_rename_the_reader_sees_old_or_new(
    run: tuple[RunPlan, Trainer], tmp_path: Path
) -> None:
    plan, trainer = run
    folder = Path(plan.run_folder) / "checkpoints"
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    old = {step: content(folder / f"step-00000{step}") for step in (2, 4)}
    save_at(trainer, 6)
    new = content(folder / "step-000006")

    seen = []
    for at in range(1, 1000):
        again(plan, kept)

        def save(at: int = at) -> int:
            events = Events(folder, at, die)
            trainer.checkpoints._newest_step = 4
            save_at(trainer, 6)
            return 0 if events.count < at else 1

        code = in_child(save)
        assert code in (0, 99), f"at event {at}"
        found = find_newest_sound(folder)
        assert found.checkpoint is not None
        assert found.passed_over == (), f"killed at event {at}"
        for checkpoint in checkpoints_in(folder):
            expected = new if checkpoint.name == "step-000006" else old[int(checkpoint.name[-1])]
            assert without_manifest(content(checkpoint)) == without_manifest(expected), (at, checkpoint.name)
        seen.append(found.checkpoint.name)
        # As the next attempt does.
        remove_unfinished(folder)
        trainer.checkpoints._newest_step = 4
        trainer.checkpoints.save(TrainState(step=8))
        trainer.checkpoints.finish()
        assert names(folder)[-1] == "step-000008"
        assert not list(folder.glob(".*"))
        assert list(checkpoint_faults(folder / "step-000008")) == []
        if code == 0:
            break
    first_new = seen.index("step-000006")
    assert seen == ["step-000004"] * first_new + ["step-000006"] * (len(seen) - first_new)
    assert first_new > 30, "every write, fsync and rename is an event"
    assert len(seen) > 45


def error_of(work: Callable[[], None]) -> UserError | None:
    try:
        work()
    except UserError as error:
        return error
    return None


def without_manifest(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: text for name, text in files.items() if name != "manifest.json"}


def test_a_disk_that_refuses_at_any_moment_leaves_what_was_there(run: tuple[RunPlan, Trainer], tmp_path: Path) -> None:
    plan, trainer = run
    folder = Path(plan.run_folder) / "checkpoints"
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    codes = []
    for at in range(1, 1000):
        again(plan, kept)

        def save(at: int = at) -> int:
            # In turn: the disk is full, broken, read-only.
            events = Events(folder, at, refuse((errno.ENOSPC, errno.EIO, errno.EROFS)[at % 3]))
            error = error_of(lambda: save_at(trainer, 6))
            if events.count < at:
                return NEVER_STRUCK
            found = find_newest_sound(folder)
            assert found.passed_over == ()
            assert found.checkpoint is not None
            assert found.checkpoint.name == "step-000006" or (error and found.checkpoint.name == "step-000004")
            if error is not None:
                assert error.exit_code == EXIT_DISK
                assert "step-000006 could not be written" in str(error)
            assert not list(folder.glob(".*.tmp"))
            save_at(trainer, 8)
            assert find_newest_sound(folder).checkpoint == folder / "step-000008"
            assert names(folder)[-2:] == [found.checkpoint.name, "step-000008"]
            return WENT_ON if error is None else FAILED

        codes.append(in_child(save))
        assert codes[-1] in (NEVER_STRUCK, WENT_ON, FAILED), f"at event {at}"
        if codes[-1] == NEVER_STRUCK:
            break
    assert codes.count(FAILED) > 30, "until the new one has its name; then only an older one is not removed"


MID_WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from packhorse.run_folder.checkpoints.listing import find_newest_sound
from packhorse.errors import UserError
from packhorse.train.checkpoint import checkpoints as checkpoint
from saving_cases import Trainer, make_run, save_at

checkpoint._no_room = lambda folder, needed: None  # something else fills the disk meanwhile
plan = make_run(Path(sys.argv[1]) / "runs")
trainer = Trainer(plan, vocab_size=4096)
save_at(trainer, 2)
try:
    save_at(trainer, 4)
except UserError as error:
    print(error.exit_code, error)
folder = Path(plan.run_folder) / "checkpoints"
print(find_newest_sound(folder).checkpoint.name, sorted(path.name for path in folder.iterdir()))
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_file(tmp_path: Path) -> None:
    need_small_disks()
    program = tmp_path / "program.py"
    program.write_text(MID_WRITE.format(tests=str(Path(__file__).parents[1])))
    disk = tmp_path / "disk"
    disk.mkdir()
    done = python_on_small_disk(program, disk, 2600, str(disk))
    assert done.code == 0, done.err
    assert f"{EXIT_DISK} {disk}/runs/tiny/checkpoints/step-000004 could not be written: " in done.out
    assert "No space left on device" in done.out
    assert "step-000002 ['step-000002']" in done.out


@pytest.mark.parametrize(("on_full", "code", "newest"), [("stop", EXIT_DISK, 4), ("continue", 0, 4)])
def test_a_launch_on_a_full_disk_ends_or_goes_on_as_the_recipe_says(
    on_full: str, code: int, newest: int, tmp_path: Path
) -> None:
    need_small_disks()
    checkpoint = {"every_steps": 2, "keep_last": 2, "on_full": on_full}
    write_tiny(tmp_path, steps=7, checkpoint=checkpoint, evaluation={"max_answered_rows": 0})
    done = train_with_small_checkpoints(tmp_path, "tiny", 2600)  # two of 1.1 MB, and not three
    assert done.code == code, done.err
    found = find_newest_sound(tmp_path / "checkpoints")
    assert found.checkpoint == tmp_path / "checkpoints" / f"step-{newest:06d}"
    assert names(tmp_path / "checkpoints") == ["step-000002", "step-000004"]
    run = tmp_path / "runs" / "tiny"
    log = (run / "logs" / "attempt-1" / "rank-0.log").read_text()
    if on_full == "stop":
        assert "step-000006 could not be written: 1.0 MB are needed for a checkpoint (0." in done.err
    else:
        assert "warning: no checkpoint of step 6" in log
        assert curve(run, "checkpoint/failed") == [1]
        assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_newest_and_the_best_stay_whatever_the_schedule(keep_best: bool, tmp_path: Path) -> None:
    """1000 runs of saves and evaluations at random; a checkpoint is here a folder that says that it is complete."""
    draw = random.Random(7)
    for number in range(500):
        folder = tmp_path / str(number)
        keep_last = draw.randint(1, 4)
        state = TrainState()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(listing, "read_manifest", lambda checkpoint: checkpoint)
            for _ in range(draw.randint(3, 12)):
                state = replace(state, step=state.step + draw.randint(1, 3))
                saves = draw.random() < 0.7
                if draw.random() < 0.6 and saves:  # only what is saved can be the best
                    state = state.saved_with(draw.random())
                if not saves:
                    continue
                newest = folder / step_folder_name(state.step)
                newest.mkdir(parents=True)
                best = step_folder_name(state.best_step) if keep_best and state.best_step else None
                prune_checkpoints(folder, keep_last, best)
                kept = complete_checkpoints(folder)
                assert newest in kept
                assert best is None or folder / best in kept
                assert len(kept) <= keep_last + keep_best
                assert len(list(folder.iterdir())) == len(kept)
