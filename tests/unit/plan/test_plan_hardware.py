"""Host memory: of the machine, or what a container or a Slurm job is held to."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.plan.topology import host_memory, memory_limits

MACHINE = 64 * 2**20 * 1024


def machine(folder: Path, group: str, **files: str) -> tuple[Path, Path]:
    """Folders as Linux has them: /proc and /sys/fs/cgroup, with files of `__` for `/`."""
    proc, groups = folder / "proc", folder / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal:  {MACHINE // 1024} kB\nMemFree: 1 kB\n", encoding="utf-8")
    (proc / "self" / "cgroup").write_text(group, encoding="utf-8")
    for name, text in files.items():
        path = groups / name.replace("__", "/").replace("_max", ".max").replace("_in_bytes", ".limit_in_bytes")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return proc, groups


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/user\n", {"user__memory_max": "max"}, MACHINE),
        ("0::/\n", {"memory_max": "2000000000"}, 2_000_000_000),
        ("0::/job_7/step\n", {"job_7__memory_max": "3000000000", "job_7__step__memory_max": "max"}, 3_000_000_000),
        ("1:cpu:/job\n4:memory:/job\n", {"memory__job__memory_in_bytes": "4000000000"}, 4_000_000_000),
        ("4:memory:/\n", {"memory__memory_in_bytes": str(2**63 - 4096)}, MACHINE),
        ("", {}, MACHINE),
    ],
    ids=["no limit", "container", "Slurm job around it", "version 1", "version 1 without a limit", "no groups"],
)
def test_the_least_limit_counts(group: str, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert host_memory(*machine(tmp_path, group, **files)) == expected


def test_where_there_is_no_linux_it_is_not_known(tmp_path: Path) -> None:
    assert host_memory(tmp_path, tmp_path) is None


def test_this_machine_has_some() -> None:
    assert 2**28 < (host_memory() or 0) < 2**50


def least(*folders: Path) -> tuple[str, int]:
    return min(memory_limits(*folders).items(), key=lambda limit: limit[1])


def test_what_limits_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    job = groups / "system.slice/job_7/step_0"
    for folder in (proc / "self", job):
        folder.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:       65536000 kB\nMemFree: 1 kB\n")
    (proc / "self/cgroup").write_text("0::/system.slice/job_7/step_0\n")
    (job / "memory.max").write_text("max\n")
    assert least(proc, groups) == ("the machine", 65536000 * 1024)
    (job.parent / "memory.max").write_text(f"{8 * 2**30}\n")
    assert least(proc, groups) == ("its cgroup", 8 * 2**30)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4000")
    assert least(proc, groups) == ("its Slurm job", 4000 * 2**20)
    (proc / "self/cgroup").write_text("5:cpuset:/\n4:memory:/job\n")
    (groups / "memory/job").mkdir(parents=True)
    (groups / "memory/job/memory.limit_in_bytes").write_text(f"{2**30}\n")
    assert least(proc, groups) == ("its cgroup", 2**30)
