"""The package as it is installed: recipes, accelerate configs, the launched script and the job script travel inside."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from cli import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has our wheel and, by a path file, the libraries of this one, but not the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = place.glob("packhorse-*.whl")
    venv.create(place / "env", with_pip=True, symlinks=True)
    python = place / "env" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    libraries = place / "libraries"
    libraries.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "packhorse" not in entry.name.lower() and not entry.name.endswith(".pth"):
            (libraries / entry.name).symlink_to(entry)
    (site,) = (place / "env" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(f"{libraries}\n")
    (place / "env" / "bin" / "accelerate").write_text(
        f"#!{python}\nimport sys\nfrom accelerate.commands.accelerate_cli import main\nsys.exit(main())\n"
    )
    (place / "env" / "bin" / "accelerate").chmod(0o755)
    return place / "env" / "bin" / "packhorse"


def test_a_shipped_recipe_is_copied_and_trained_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    def typed(*words: str) -> str:
        done = subprocess.run(
            [str(installed), *words],
            cwd=tmp_path,
            env={**environment(), "PYTHONSAFEPATH": "1", "PATH": f"{installed.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "llama3.3-70b/qlora" in typed("recipes")
    typed("recipes", "copy", "quickstart/full", "my.yaml")
    shown = typed("train", "my.yaml", "steps=3", "track.wandb=off")
    assert str(ROOT) not in shown
    assert (tmp_path / "runs" / "quickstart-full" / "model" / "model.safetensors").is_file()
    inside = list(installed.parents[1].glob("lib/python*/site-packages/packhorse/shipped/slurm/job.sbatch"))
    assert len(inside) == 1
