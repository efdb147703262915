"""The sealed test rows: one look, written down before a row is read; training and validation never need them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from packhorse import durable
from packhorse.data import seal
from packhorse.data.data_manifest import TestLook as Look  # pytest would collect a class called Test…
from packhorse.data.data_manifest import read_data_manifest
from packhorse.data.packs.store import open_store
from packhorse.data.seal import describe_looks, open_test, record_look
from packhorse.errors import UserError
from prepared import write_prepared

FIRST, SECOND = "2026-05-01T10:00:00+00:00", "2026-05-02T11:00:00+00:00"


def document(number: int):
    return [number, number + 1, 4], [0, 1, 1], {"text": f"row {number}", "fields": {}, "where": f"f:{number}"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    splits = {"train": range(10), "validation": range(10, 13), "test": range(20, 24)}
    return write_prepared(tmp_path / "data", {name: [document(n) for n in rows] for name, rows in splits.items()})


def looks_on_disk(data: Path) -> list[dict[str, str]]:
    return json.loads((data / "data.json").read_text())["test_looks"]


def test_the_first_look_opens_the_test_rows_and_is_written_down(data: Path) -> None:
    before = json.loads((data / "data.json").read_text())
    documents, looks = open_test(data, "tiny", FIRST)
    assert [documents.document(at)[0].tolist()[0] for at in range(documents.num_documents)] == [20, 21, 22, 23]
    assert looks == (Look(run="tiny", at=FIRST),)
    assert json.loads((data / "data.json").read_text()) == before | {"test_looks": [{"run": "tiny", "at": FIRST}]}
    assert sorted(path.name for path in data.iterdir() if path.suffix == ".draft") == []


def test_a_second_look_is_refused_whoever_looks(data: Path) -> None:
    open_test(data, "tiny", FIRST)
    for run in ("tiny", "other"):
        with pytest.raises(UserError) as error:
            open_test(data, run, SECOND)
        assert f"the test set was opened once: tiny ({FIRST})" in str(error.value)
        assert "--again" in str(error.value)
    assert len(looks_on_disk(data)) == 1


def test_again_is_counted(data: Path) -> None:
    open_test(data, "tiny", FIRST)
    documents, looks = open_test(data, "other", SECOND, again=True)
    assert documents.num_documents == 4
    assert [look.run for look in looks] == ["tiny", "other"]
    assert looks_on_disk(data) == [{"run": "tiny", "at": FIRST}, {"run": "other", "at": SECOND}]
    assert describe_looks(looks) == f"the test set was opened 2 times: tiny ({FIRST}), other ({SECOND})"
    assert describe_looks(()) == ""


def test_the_look_counts_before_a_row_is_read(data: Path, monkeypatch) -> None:
    """An evaluation that is killed has seen the rows, for all that anybody knows."""

    def killed(folder: Path, *_: object, **__: object):
        assert [look["run"] for look in looks_on_disk(folder)] == ["tiny"]
        raise KeyboardInterrupt

    monkeypatch.setattr(seal, "open_store", killed)
    with pytest.raises(KeyboardInterrupt):
        open_test(data, "tiny", FIRST)
    with pytest.raises(UserError, match="opened once"):
        record_look(data, "tiny", SECOND)


def test_of_many_that_look_at_once_one_is_the_first(data: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from packhorse.data import seal
from packhorse.errors import UserError

write = seal._rewrite

def slowly(*words):
    time.sleep(0.3)
    write(*words)

seal._rewrite = slowly
print("ready", flush=True)
sys.stdin.readline()
try:
    seal.record_look(Path(sys.argv[1]), sys.argv[2], "now")
except UserError:
    sys.exit(3)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    runs = [subprocess.Popen([sys.executable, "-c", code, str(data), f"run-{at}"], **pipes) for at in range(4)]
    for run in runs:
        assert run.stdout.readline() == b"ready\n"
    for run in runs:
        run.stdin.write(b"go\n")
        run.stdin.flush()
    for run in runs:
        run.communicate()
    assert sorted(run.returncode for run in runs) == [0, 3, 3, 3]
    assert len(looks_on_disk(data)) == 1


def test_data_without_test_rows_says_so_and_counts_nothing(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", {"train": [document(1)]}, shares=(0.85, 0.15, 0.0))
    with pytest.raises(UserError) as error:
        open_test(data, "tiny", FIRST)
    assert "0.85 / 0.15 / 0" in str(error.value)
    assert "data.split.test" in str(error.value)
    assert looks_on_disk(data) == []


def test_test_rows_that_are_gone_cost_no_look(data: Path) -> None:
    shutil.rmtree(data / "test")
    with pytest.raises(UserError, match=r"test does not exist"):
        open_test(data, "tiny", FIRST)
    assert looks_on_disk(data) == []


def test_a_folder_that_cannot_be_written_opens_nothing(data: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "sync_to_disk", full)
    with pytest.raises(UserError, match=r"data\.json cannot be written: No space left on device"):
        open_test(data, "tiny", FIRST)
    assert read_data_manifest(data).test_looks == ()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_and_validation_do_not_need_the_test_rows(data: Path, split: str) -> None:
    shutil.rmtree(data / "test")
    assert open_store(data, split).num_documents > 0


def test_the_test_rows_are_not_opened_by_name(data: Path) -> None:
    with pytest.raises(ValueError, match="sealed"):
        open_store(data, "test")
    assert looks_on_disk(data) == []
