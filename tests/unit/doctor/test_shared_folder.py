from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from packhorse.doctor import shared_folder as module
from packhorse.doctor.facts import DoctorRequest, FolderFacts
from packhorse.doctor.rendezvous import Rendezvous, RendezvousServer, join_rendezvous, open_port
from packhorse.doctor.shared_folder import check_folder_of, check_shared_folder, create_check_folder

FULL_DISK = """
import sys
sys.path.insert(0, sys.argv[2])
from packhorse.doctor.facts import DoctorRequest
from packhorse.doctor.rendezvous import Rendezvous
from packhorse.doctor.shared_folder import check_shared_folder

request = DoctorRequest(num_nodes=1, gpus_per_node=0, folder=sys.argv[1], token="0", fast=True)
print(check_shared_folder(0, request, Rendezvous()).model_dump_json())
"""


@pytest.fixture
def rendezvous() -> list[Rendezvous]:
    with open_port(0) as probe:
        port = probe.getsockname()[1]
    server = RendezvousServer(port, 2, 5.0)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda number: join_rendezvous("127.0.0.1", port, {"node_id": number}, 5.0), range(2)))
    yield found
    for connection in found:
        connection.close()
    server.close()


def request_for(folder: Path, **more: object) -> DoctorRequest:
    return DoctorRequest(num_nodes=2, gpus_per_node=0, folder=str(folder), token="0123", **more)


def check(requests: list[DoctorRequest], rendezvous: list[Rendezvous]) -> list[FolderFacts]:
    """Check both nodes at once, each with its own view of the folder."""
    with ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(lambda number: check_shared_folder(number, requests[number], rendezvous[number]), range(2))
        )


def test_a_folder_that_is_shared(tmp_path: Path, rendezvous: list[Rendezvous]) -> None:
    (tmp_path / "plan.json").write_text("{}")
    place = create_check_folder(request_for(tmp_path))
    found = check([request_for(tmp_path)] * 2, rendezvous)
    assert [each.sees_nodes for each in found] == [(0, 1), (0, 1)]
    assert all(each.sees_request_file and each.exists and each.plan_sha256 for each in found)
    assert found[1].rename_reads > 10
    assert [(each.rename_faults, each.rename_fault) for each in found] == [(0, "")] * 2
    assert found[0].write_bytes_per_second is not None
    # Only the file of the requester is left.
    assert [path.name for path in place.iterdir()] == ["start"]


def test_a_folder_of_each_nodes_own(
    tmp_path: Path, rendezvous: list[Rendezvous], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEE_SECONDS", 0.5)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    create_check_folder(request_for(tmp_path / "a"))
    found = check([request_for(tmp_path / name, fast=True) for name in ("a", "b")], rendezvous)
    assert [each.sees_nodes for each in found] == [(0,), (1,)]
    assert [each.sees_request_file for each in found] == [True, False]
    assert not check_folder_of(request_for(tmp_path / "b")).exists()


def test_a_rename_that_is_not_atomic_is_found(
    tmp_path: Path, rendezvous: list[Rendezvous], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(file: Path, number: int) -> None:  # as object stores mounted as folders do
        file.unlink(missing_ok=True)
        with file.open("wb", buffering=0) as target:
            for _ in range(64):
                target.write(b"%08d" % number * (module.NUM_BLOCKS // 64))

    monkeypatch.setattr(module, "_replace", copied)
    create_check_folder(request_for(tmp_path))
    found = check([request_for(tmp_path)] * 2, rendezvous)
    assert found[1].rename_faults > 0
    assert found[1].rename_fault in ("the file was absent",) or "of 65,536" in found[1].rename_fault


def test_a_stale_handle_is_distinguished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [errno.ESTALE, errno.EIO]

    def read(_: Path) -> bytes:
        raise OSError(numbers.pop(0), "of a network file system")

    monkeypatch.setattr(Path, "read_bytes", read)
    assert module._fault_of_read(tmp_path / "file") == module.STALE
    with pytest.raises(OSError, match="of a network file system"):
        module._fault_of_read(tmp_path / "file")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    alone = DoctorRequest(num_nodes=1, gpus_per_node=0, folder=str(tmp_path / "no"), token="0", fast=True)
    (tmp_path / "no").touch()
    found = check_shared_folder(0, alone, Rendezvous())
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
