from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from packhorse.doctor import shared_folder as module
from packhorse.doctor.facts import DoctorRequest, FolderFacts
from packhorse.doctor.rendezvous import Hub, Meeting, join, open_port
from packhorse.doctor.shared_folder import examine_folder, meeting_place, open_place

FULL_DISK = """
import sys
sys.path.insert(0, sys.argv[2])
from packhorse.doctor.facts import DoctorRequest
from packhorse.doctor.shared_folder import examine_folder
from packhorse.doctor.rendezvous import Meeting

asked = DoctorRequest(num_nodes=1, gpus_per_node=0, folder=sys.argv[1], token="0", fast=True)
print(examine_folder(0, asked, Meeting()).model_dump_json())
"""


@pytest.fixture
def meetings() -> list[Meeting]:
    with open_port(0) as probe:
        port = probe.getsockname()[1]
    hub = Hub(port, 2, 5.0)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda number: join("127.0.0.1", port, {"node_id": number}, 5.0), range(2)))
    yield found
    for meeting in found:
        meeting.close()
    hub.close()


def asked(folder: Path, **more: object) -> DoctorRequest:
    return DoctorRequest(num_nodes=2, gpus_per_node=0, folder=str(folder), token="0123", **more)


def examine(questions: list[DoctorRequest], meetings: list[Meeting]) -> list[FolderFacts]:
    """Both nodes at once, each with its own view of the folder."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda number: examine_folder(number, questions[number], meetings[number]), range(2)))


def test_a_folder_that_is_shared(tmp_path: Path, meetings: list[Meeting]) -> None:
    (tmp_path / "plan.json").write_text("{}")
    place = open_place(asked(tmp_path))
    found = examine([asked(tmp_path)] * 2, meetings)
    assert [each.sees for each in found] == [(0, 1), (0, 1)]
    assert all(each.sees_start and each.exists and each.plan_sha256 for each in found)
    assert found[1].rename_reads > 10
    assert [(each.rename_faults, each.rename_fault) for each in found] == [(0, "")] * 2
    assert found[0].write_bytes_per_second is not None
    # Only the file of whoever asked is left for it.
    assert [path.name for path in place.iterdir()] == ["start"]


def test_a_folder_of_each_nodes_own(tmp_path: Path, meetings: list[Meeting], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEE_SECONDS", 0.5)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    open_place(asked(tmp_path / "a"))
    found = examine([asked(tmp_path / name, fast=True) for name in ("a", "b")], meetings)
    assert [each.sees for each in found] == [(0,), (1,)]
    assert [each.sees_start for each in found] == [True, False]
    assert not meeting_place(asked(tmp_path / "b")).exists()


def test_a_rename_that_is_none_is_seen(
    tmp_path: Path, meetings: list[Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(file: Path, number: int) -> None:  # as object stores do that are mounted as folders
        file.unlink(missing_ok=True)
        with file.open("wb", buffering=0) as target:
            for _ in range(64):
                target.write(b"%08d" % number * (module.BLOCKS // 64))

    monkeypatch.setattr(module, "_replace", copied)
    open_place(asked(tmp_path))
    found = examine([asked(tmp_path)] * 2, meetings)
    assert found[1].rename_faults > 0
    assert found[1].rename_fault in ("no file was there",) or "of 65,536" in found[1].rename_fault


def test_a_stale_handle_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [errno.ESTALE, errno.EIO]

    def read(_: Path) -> bytes:
        raise OSError(numbers.pop(0), "of a network file system")

    monkeypatch.setattr(Path, "read_bytes", read)
    assert module._torn(tmp_path / "file") == module.STALE
    with pytest.raises(OSError, match="of a network file system"):
        module._torn(tmp_path / "file")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    alone = DoctorRequest(num_nodes=1, gpus_per_node=0, folder=str(tmp_path / "no"), token="0", fast=True)
    (tmp_path / "no").touch()
    found = examine_folder(0, alone, Meeting())
    assert (found.exists, found.write_error) == (False, "Not a directory")


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "faults")
    from small_disk import need_small_disks, python_on_small_disk

    need_small_disks()
    (tmp_path / "disk").mkdir()
    program = tmp_path / "program.py"
    program.write_text(FULL_DISK)
    source = Path(module.__file__).parents[2]
    done = python_on_small_disk(program, tmp_path / "disk", 256, str(tmp_path / "disk"), str(source))
    found = FolderFacts.model_validate_json(done.out)
    assert found.write_error == "No space left on device"
