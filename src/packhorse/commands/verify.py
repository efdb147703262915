"""`packhorse verify RUN`: is every checkpoint what was written, byte for byte?"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from packhorse.checkpoints.manifest import faults_of
from packhorse.checkpoints.shelf import checkpoints_in
from packhorse.errors import EXIT_BUG, EXIT_OK
from packhorse.launching.run_folder import open_run, relative


def verify(run: str) -> int:
    """Reads every checkpoint of a run whole, and names each file that is not as it was written.

    Returns:
        0 where all are sound, 1 where one is not.

    Raises:
        UserError: There is no such run.
    """
    console = Console()
    folder = Path(open_run(run).run_folder) / "checkpoints"
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        console.print(f"{relative(folder)} holds no checkpoint.", soft_wrap=True, highlight=False)
        return EXIT_OK
    faults = {checkpoint.name: list(faults_of(checkpoint)) for checkpoint in checkpoints}
    for name, found in faults.items():
        console.print(f"{name}  {'damaged' if found else 'sound'}", highlight=False)
        for fault in found:
            console.print(f"  {fault}", soft_wrap=True, highlight=False)
    sound = [name for name, found in faults.items() if not found]
    goes_on = (
        f"`packhorse train {relative(folder.parent)} --resume` goes on from {sound[-1]}" if sound else "none is sound"
    )
    console.print(f"{len(sound)} of {len(faults)} are sound; {goes_on}.", soft_wrap=True, highlight=False)
    return EXIT_OK if len(sound) == len(faults) else EXIT_BUG
