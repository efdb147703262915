"""One launcher per run: the lock of a dead one is taken over, that of a living one never."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from packhorse.errors import UserError
from packhorse.run_folder.layout import LOCK_FILE
from packhorse.run_folder.lock import launcher_lock

HOLD = """
import sys, time
from pathlib import Path
from packhorse.run_folder.lock import launcher_lock
with launcher_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_a_second_launcher_is_refused_at_once_with_the_holder(tmp_path: Path) -> None:
    with holder(tmp_path) as child:
        try:
            began = time.monotonic()
            with pytest.raises(UserError, match=f"process {child.pid} on ") as caught, launcher_lock(tmp_path):
                pass
            assert time.monotonic() - began < 2
            assert str(tmp_path / LOCK_FILE) in str(caught.value)
        finally:
            child.kill()


def test_the_lock_of_a_killed_launcher_is_taken_over(tmp_path: Path) -> None:
    with holder(tmp_path) as child:
        child.kill()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == child.pid
    with launcher_lock(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_another_hosts_lock_is_never_taken_over_however_old(tmp_path: Path) -> None:
    record = {"pid": 1, "host": "another-host", "since": "2001-01-01T00:00:00+00:00"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match="process 1 on another-host since 2001"), launcher_lock(tmp_path):
        pass
    assert json.loads((tmp_path / LOCK_FILE).read_text()) == record


def test_a_damaged_lock_file_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("{")
    with launcher_lock(tmp_path):
        pass
