"""Programs that run where a folder is a small disk of its own: a tmpfs, mounted in a namespace that ends with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cli import PACKHORSE, Typed, environment
from missing_parts import missing

IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def need_small_disks() -> None:
    """Skips where this machine gives its users no mount namespaces."""
    if shutil.which("unshare") is None or subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True).returncode:
        missing("this machine allows no mount namespaces; what is full is then only played (test_writing.py)")


def python_on_small_disk(program: Path, disk: Path, size_kib: int, *words: str) -> Typed:
    """Runs a Python program while `disk`, which exists, holds no more than `size_kib`."""
    mount = [sys.executable, __file__, str(disk), str(size_kib), sys.executable, str(program), *words]
    done = subprocess.run([*IN_A_NAMESPACE, *mount], capture_output=True, text=True, timeout=600, env=_environment())
    return Typed(done.returncode, done.stdout, done.stderr)


def train_with_small_checkpoints(folder: Path, run: str, size_kib: int) -> Typed:
    """Types `packhorse train tiny.yaml`, with RUN/checkpoints as the small disk from the first step on.

    The checkpoints are copied out before the disk is gone, to FOLDER/checkpoints.
    """
    words = [sys.executable, __file__, str(folder), run, str(size_kib)]
    done = subprocess.run([*IN_A_NAMESPACE, *words], capture_output=True, text=True, timeout=600, env=_environment())
    return Typed(done.returncode, done.stdout, done.stderr)


def _environment() -> dict[str, str]:
    return {**environment(), "PYTHONPATH": str(Path(__file__).parents[1])}


def mount(disk: Path, size_kib: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(disk)], check=True)


def main(words: list[str]) -> int:
    if len(words) > 3:
        disk, size_kib, *command = words
        mount(Path(disk), size_kib)
        os.execv(command[0], command)
    folder, run, size_kib = words
    del os.environ["PYTHONPATH"]
    child = subprocess.Popen([str(PACKHORSE), "train", "tiny.yaml"], cwd=folder)
    place = Path(folder) / "runs" / run
    while not place.is_dir() and child.poll() is None:
        time.sleep(0.01)
    (place / "checkpoints").mkdir(exist_ok=True)
    mount(place / "checkpoints", size_kib)
    code = child.wait()
    shutil.copytree(place / "checkpoints", Path(folder) / "checkpoints")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
