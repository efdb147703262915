"""Try Packhorse on the newest releases of the libraries whose private names it uses.

python tools/canary.py                 newest of all of them
python tools/canary.py --keep torch    torch as constraints.txt pins it; its newest wheel is only searched for the names

Builds a throw-away environment, prints the versions and the names that are missing, then runs the unit tests and a
share of the parity tests. Exit code 0 where all of it passes. `make canary` runs it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packhorse.library_hooks import library_hooks, missing_names

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/unit", "tests/parity/test_packing.py", "tests/parity/test_qlora.py")


def main() -> int:
    """Run the canary; return the exit code of the tests, or 1 where names are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="*", default=[], help="libraries that stay at the tested version")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="what pytest runs")
    options = parser.parse_args()
    libraries = sorted({hook.library for hook in library_hooks()} | {"bitsandbytes"})
    with tempfile.TemporaryDirectory(prefix="canary-") as folder:
        python = Path(folder) / "bin" / "python"
        run(sys.executable, "-m", "venv", folder)
        run(python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".[dev]")
        newest = [library for library in libraries if library not in options.keep]
        # pip warns that these are above the caps of pyproject.toml, which is the point.
        run(python, "-m", "pip", "install", "--quiet", "--upgrade", *newest)
        run(python, "-m", "pip", "list", "--format=freeze")
        kept = [missing_in_newest_wheel(python, library, Path(folder)) for library in options.keep]
        code = "from packhorse.library_hooks import check_library_hooks; check_library_hooks()"
        hooks = subprocess.run([python, "-c", code], cwd=ROOT, check=False)
        tests = subprocess.run([python, "-m", "pytest", "-q", *options.tests], cwd=ROOT, check=False)
    return tests.returncode or hooks.returncode or int(any(kept))


def missing_in_newest_wheel(python: Path, library: str, folder: Path) -> bool:
    """Download the newest wheel of a library without installing it; print and return whether names are missing."""
    wheels = folder / "wheels"
    run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(wheels), library)
    (wheel,) = wheels.glob(f"{library}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sources = [name for name in archive.namelist() if re.search(r"\.pyi?$", name)]
        archive.extractall(folder / library, sources)
    missing = missing_names([hook for hook in library_hooks() if hook.library == library], folder / library)
    print(f"{wheel.name}: {', '.join(name for _, name in missing) or 'no name is missing'}")
    return bool(missing)


def run(*words: str | Path) -> None:
    """Run a command in the checkout; a failure ends the canary."""
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
