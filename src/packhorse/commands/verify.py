"""`packhorse verify RUN`: are its checkpoints and its prepared data what was written, byte for byte?"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from packhorse.data.data_manifest import DATA_MANIFEST_FILE, content_faults, read_data_manifest, recorded_files
from packhorse.errors import EXIT_BUG, EXIT_OK
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints.listing import checkpoints_in
from packhorse.run_folder.checkpoints.manifest import checkpoint_faults
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.jobs import require_prepared_data
from packhorse.run_folder.layout import CHECKPOINTS_FOLDER
from packhorse.run_folder.status import read_status


def verify(run: str) -> int:
    """Reads every checkpoint of a run and its prepared data whole, and names each file that is not as it was written.

    Returns:
        0 where all are sound, 1 where one is not.

    Raises:
        UserError: There is no such run.
    """
    plan = open_run(run)
    checkpoints_are_sound = _checkpoints(Path(plan.run_folder) / CHECKPOINTS_FOLDER)
    data_is_sound = _prepared_data(plan)
    return EXIT_OK if checkpoints_are_sound and data_is_sound else EXIT_BUG


def _checkpoints(folder: Path) -> bool:
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        _say(f"{relative(folder)} holds no checkpoint.")
        return True
    faults = {checkpoint.name: list(checkpoint_faults(checkpoint)) for checkpoint in checkpoints}
    for name, found in faults.items():
        _show(name, found)
    sound = [name for name, found in faults.items() if not found]
    status = read_status(folder.parent)
    goes_on = f"; `packhorse resume {relative(folder.parent)}` goes on from {sound[-1]}" if sound else ""
    if status is not None and status.state == "finished":
        goes_on = "; the run is finished"
    _say(f"{len(sound)} of {len(faults)} are sound{goes_on}.")
    return len(sound) == len(faults)


def _prepared_data(plan: RunPlan) -> bool:
    require_prepared_data(plan)
    assert plan.data is not None
    folder = Path(plan.data.folder)
    # Not the run's copy of it: data that was prepared again, of files that lie elsewhere now, names other places.
    manifest = read_data_manifest(folder)
    name = f"prepared data {relative(folder)}"
    if manifest is None:
        _show(name, [f"{DATA_MANIFEST_FILE} is missing: there is nothing that was prepared to its end."])
        _say(f"Make it again: packhorse prepare {relative(plan.run_folder)}/recipe.yaml")
        return False
    if not recorded_files(manifest):
        _say(f"{name}  not checked: it was prepared by a version that kept no hashes of its files.")
        return True
    found = list(content_faults(folder, manifest).values())
    _show(name, found)
    if found:
        _say(
            f"Remove {relative(folder)}, then make it again: packhorse prepare {relative(plan.run_folder)}/recipe.yaml"
        )
    return not found


def _show(name: str, faults: list[str]) -> None:
    _say(f"{name}  {'damaged' if faults else 'sound'}")
    for fault in faults:
        _say(f"  {fault}")


def _say(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False, markup=False)
