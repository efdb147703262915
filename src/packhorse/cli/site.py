"""`packhorse site`: write a first profile of the cluster."""

from __future__ import annotations

from pathlib import Path

from packhorse.cli.show.text import print_plain
from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.slurm.site import load_site
from packhorse.launching.slurm.site_probe import probe_site
from packhorse.run_folder.folder import relative


def site(target: str, partition: str, name: str) -> int:
    """Write a profile from what Slurm reports, with a comment on each line.

    Raises:
        UserError: The file exists or cannot be written, Slurm is not available, or has no such partition.
    """
    path = Path(target)
    if path.exists() or path.is_symlink():
        raise UserError(f"{target} exists already.", "the profile would overwrite it.", "use another file name.")
    text = probe_site(name, partition)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}.", "the profile is a file.", "use another file name."
        ) from error
    load_site(target)
    print_plain(text)
    print_plain(f"wrote {relative(path)}; read it, then: packhorse submit RECIPE --dry-run")
    return EXIT_OK
