"""RUN/base.json: which weights a run was trained from, so that an evaluation notices when others lie there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from huggingface_hub import try_to_load_from_cache

from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.locate import expand
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import BASE_FILE

SAMPLES: Final = 64
SAMPLE_BYTES: Final = 1 << 16


def record_base(plan: RunPlan) -> None:
    """Write the fingerprint of each weight file that the run starts from, once; nothing for a fresh model."""
    folder, file = _base_folder(plan), Path(plan.run_folder) / BASE_FILE
    if folder is not None and not file.exists():
        replace_file(file, json.dumps(_fingerprints(folder), indent=2) + "\n")


def require_base(plan: RunPlan) -> None:
    """Compare the base on this machine with the weights that the run was trained from.

    Raises:
        UserError: The base is gone, or its weights are others.
    """
    folder, file = _base_folder(plan), Path(plan.run_folder) / BASE_FILE
    if folder is None:
        return
    if not (folder / "config.json").is_file():
        raise UserError(
            f"the base model of {relative(plan.run_folder)}, {folder}, "
            + ("holds no config.json." if folder.is_dir() else "does not exist."),
            "the tuned model is compared with the weights that training started from, and an adapter needs them.",
            "move the base back to this folder.",
        )
    if not file.is_file():
        return  # a run of an earlier version
    recorded, found = json.loads(file.read_text(encoding="utf-8")), _fingerprints(folder)
    if recorded != found:
        changed = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
        raise UserError(
            f"{folder / changed[0]} is not the file that {relative(plan.run_folder)} was trained from: "
            f"{found.get(changed[0], 'absent')} is not {recorded.get(changed[0], 'absent')}.",
            "a comparison with other weights would not show what training changed, and an adapter fits only its base.",
            "put the original weights back, or train the run again on these.",
        )


def _base_folder(plan: RunPlan) -> Path | None:
    """Return the folder of the base; None for a fresh model, and for one of the hub that is not on this machine."""
    if plan.base_model is None:
        return None
    source = expand(plan.base_model)
    if plan.recipe.model.path is not None:
        return Path(source)
    cached = try_to_load_from_cache(source, "config.json", revision=plan.recipe.model.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _fingerprints(folder: Path) -> dict[str, str]:
    """Return size and hash of samples of each weight file; reading all of a large model would take minutes."""
    return {path.name: _fingerprint(path) for path in sorted(folder.glob("*.safetensors"))}


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for sample in range(SAMPLES):
            file.seek(sample * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return f"{size}-{digest.hexdigest()[:16]}"
