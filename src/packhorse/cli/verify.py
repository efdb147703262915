"""`packhorse verify RUN`: check that checkpoints and prepared data are what was written, byte for byte."""

from __future__ import annotations

from pathlib import Path

from packhorse.cli.show.text import print_plain
from packhorse.data.data_manifest import DATA_MANIFEST_FILE, content_faults, read_data_manifest, recorded_files
from packhorse.errors import EXIT_BUG, EXIT_OK
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints.listing import checkpoints_in
from packhorse.run_folder.checkpoints.manifest import checkpoint_faults
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.jobs import require_prepared_data
from packhorse.run_folder.layout import CHECKPOINTS_FOLDER
from packhorse.run_folder.result import read_result
from packhorse.run_folder.status import read_status


def verify(run: str) -> int:
    """Read all checkpoints and the prepared data of a run, and name every damaged file.

    Returns:
        0 if all are valid, 1 if one is not.

    Raises:
        UserError: There is no such run.
    """
    plan = open_run(run)
    checkpoints_are_valid = _verify_checkpoints(Path(plan.run_folder) / CHECKPOINTS_FOLDER)
    data_is_valid = _verify_data(plan)
    return EXIT_OK if checkpoints_are_valid and data_is_valid else EXIT_BUG


def _verify_checkpoints(folder: Path) -> bool:
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        print_plain(f"{relative(folder)} holds no checkpoint.")
        return True
    faults = {checkpoint.name: list(checkpoint_faults(checkpoint)) for checkpoint in checkpoints}
    for name, faults_of_one in faults.items():
        _show(name, faults_of_one)
    valid = [name for name, faults_of_one in faults.items() if not faults_of_one]
    status = read_status(folder.parent)
    next_step = f"; `packhorse resume {relative(folder.parent)}` resumes from {valid[-1]}" if valid else ""
    if status is not None and status.state == "finished":
        result = read_result(folder.parent)
        next_step = "; the run is finished" + (f", and its result is {result.words}" if result is not None else "")
    print_plain(f"{len(valid)} of {len(faults)} are sound{next_step}.")
    return len(valid) == len(faults)


def _verify_data(plan: RunPlan) -> bool:
    require_prepared_data(plan)
    assert plan.data is not None
    folder, run = Path(plan.data.folder), relative(plan.run_folder)
    # Not the run's copy of the manifest: data that was prepared again, from moved files, names other paths.
    manifest = read_data_manifest(folder)
    name = f"prepared data {relative(folder)}"
    if manifest is None:
        _show(name, [f"{DATA_MANIFEST_FILE} is missing: the data was never prepared completely."])
        print_plain(f"Prepare it again: packhorse prepare {run}")
        return False
    if not recorded_files(manifest):
        print_plain(f"{name}  not checked: it was prepared by a version that kept no hashes of its files.")
        return True
    faults = list(content_faults(folder, manifest).values())
    _show(name, faults)
    if faults:
        print_plain(f"Remove {relative(folder)}, then prepare it again: packhorse prepare {run}")
    return not faults


def _show(name: str, faults: list[str]) -> None:
    print_plain(f"{name}  {'damaged' if faults else 'sound'}")
    for fault in faults:
        print_plain(f"  {fault}")
