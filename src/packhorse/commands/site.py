"""`packhorse site`: writes a first profile of the cluster."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.slurm.site import load_site
from packhorse.launching.slurm.site_probe import probe_site
from packhorse.run_folder.folder import relative


def site(target: str, partition: str, name: str) -> int:
    """Asks Slurm, and writes what it says, each line explained.

    Raises:
        UserError: The file exists or cannot be written, there is no Slurm here, or no such partition.
    """
    path = Path(target)
    if path.exists() or path.is_symlink():
        raise UserError(f"{target} exists already.", "a profile would overwrite it.", "give another file name.")
    text = probe_site(name, partition)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}.", "the profile needs a place.", "give another file name."
        ) from error
    load_site(target)
    console = Console()
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {relative(path)}; read it, then: packhorse submit RECIPE --dry-run", highlight=False)
    return EXIT_OK
