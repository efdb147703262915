"""W&B, TensorBoard and MLflow, through accelerate's trackers.

Only the worker imports this module: accelerate imports torch, which would slow `packhorse status` down. accelerate
imports wandb, tensorboard and mlflow inside `start`, so none is loaded unless a recipe enables it.
"""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from accelerate.state import is_initialized
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from packhorse.recipe.schema import Recipe
from packhorse.run_folder.layout import MLFLOW_FOLDER, MLFLOW_ID_FILE, WANDB_ID_FILE
from packhorse.track.meter import Figures

WANDB_HOSTS: Final = ("api.wandb.ai", "api.forge.coreweave.com")
TIMEOUT_SECONDS: Final = 30.0

logger = logging.getLogger(__name__)


class GuardedTracker:
    """A tracker that may fail without ending the run: one warning, then nothing; metrics.jsonl has every figure."""

    def __init__(self, name: str, tracker: GeneralTracker) -> None:
        """Start the tracker."""
        self._name = name
        self._tracker = tracker
        self.alive = True
        self._attempt(tracker.start)

    def log(self, step: int, figures: Figures) -> None:
        """Pass the figures to the tracker."""
        self._attempt(lambda: self._tracker.log(figures, step=step))

    def close(self) -> None:
        """Finish the tracker."""
        self._attempt(self._tracker.finish)

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self.alive:
            return
        try:
            action()
        except Exception as error:
            # Any exception: trackers raise many types, and none justifies losing a training run.
            self.alive = False
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s is off for this run (%s); metrics.jsonl still gets all figures.", self._name, reason)


def open_trackers(
    recipe: Recipe, run_folder: Path, first_step: int, facts: Mapping[str, Any] | None = None
) -> list[GuardedTracker]:
    """Start the trackers of the recipe; call it on rank 0 only, after the Accelerator was made.

    Args:
        recipe: Recipe with its `track` section; all of it, with `${env:NAME}` unexpanded, becomes W&B's config.
        run_folder: RUN; W&B writes to RUN/wandb and RUN/wandb_id.txt, TensorBoard to RUN/tensorboard, MLflow to
            RUN/mlflow_id.txt and, without a server, to `.mlflow` beside RUN.
        first_step: First step that this attempt will log.
        facts: Further entries of W&B's config, such as the data's ledger.
    """
    # accelerate's trackers log through its state; without one each would fail as if the network were missing.
    if not is_initialized():
        raise RuntimeError("the Accelerator must be made before the trackers")
    trackers = []
    mode = wandb_mode(recipe.track.wandb, os.environ, Path.home() / ".netrc")
    if mode is not None:
        trackers.append(open_wandb(recipe, run_folder, mode, facts))
    if recipe.track.tensorboard:
        trackers.append(open_tensorboard(run_folder, first_step))
    if recipe.track.mlflow:
        trackers.append(open_mlflow(recipe, run_folder))
    return [tracker for tracker in trackers if tracker.alive]


def wandb_mode(
    choice: Literal["auto", "online", "offline", "off"], environment: Mapping[str, str], netrc_file: Path
) -> Literal["online", "offline"] | None:
    """Return W&B's mode, None for off; `auto` follows WANDB_MODE, and otherwise is online where a key is set.

    Args:
        choice: `track.wandb` of the recipe.
        environment: Environment variables.
        netrc_file: File where `wandb login` keeps keys, unless NETRC names another.
    """
    if choice != "auto":
        return None if choice == "off" else choice
    requested = environment.get("WANDB_MODE")
    if requested == "disabled":
        return None
    has_key = bool(environment.get("WANDB_API_KEY")) or _netrc_has_key(
        Path(environment.get("NETRC", netrc_file)), environment.get("WANDB_BASE_URL")
    )
    return "online" if has_key and requested != "offline" else "offline"


def open_wandb(
    recipe: Recipe,
    run_folder: Path,
    mode: Literal["online", "offline"],
    facts: Mapping[str, Any] | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> GuardedTracker:
    """Start or resume the W&B run of a run folder; the timeout holds for the start and for the last upload."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read once, when wandb is imported
    settings = {
        "init_timeout": timeout_seconds,
        "login_timeout": timeout_seconds,
        "finish_timeout": timeout_seconds,  # without it, a lost network blocks the finished run for hours
        "finish_timeout_raises": True,
        "disable_code": True,  # upload neither source files nor uncommitted changes
        "console": "off",
        "silent": True,
    }
    tracker = WandBTracker(
        recipe.track.wandb_project,
        name=recipe.name,
        id=wandb_id(run_folder),
        resume="allow",
        mode=mode,
        dir=str(run_folder),  # wandb creates its folder `wandb` inside
        config={**recipe.model_dump(mode="json"), **(facts or {})},
        settings=settings,
    )
    guarded = GuardedTracker("W&B", tracker)
    if guarded.alive:
        logger.info("W&B: %s", tracker.tracker.url or f"offline in {run_folder / 'wandb'}; upload with `wandb sync`")
    return guarded


def wandb_id(run_folder: Path) -> str:
    """Return the W&B id of a run folder; created once, so that a restart resumes the same W&B run."""
    file = run_folder / WANDB_ID_FILE
    if not file.is_file():
        file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def open_tensorboard(run_folder: Path, first_step: int) -> GuardedTracker:
    """Start TensorBoard's event file in RUN/tensorboard; earlier events from `first_step` on are hidden as repeated."""
    tracker = TensorBoardTracker("tensorboard", str(run_folder), purge_step=first_step)
    # accelerate names the wrong main process on some DeepSpeed launches; the caller is rank 0.
    tracker.main_process_only = False
    return GuardedTracker("TensorBoard", tracker)


def open_mlflow(recipe: Recipe, run_folder: Path) -> GuardedTracker:
    """Start or resume the MLflow run of a run folder: its experiment is the W&B project, its parameters the recipe."""
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_TRACKING_URI"] = (run_folder.parent / MLFLOW_FOLDER).absolute().as_uri()
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow 3 refuses its own file format without it
    file = run_folder / MLFLOW_ID_FILE
    known = file.read_text(encoding="utf-8").strip() if file.is_file() else None
    tracker = MLflowTracker(recipe.track.wandb_project, run_id=known, run_name=recipe.name)
    # accelerate names the wrong main process on some DeepSpeed launches; the caller is rank 0.
    tracker.main_process_only = False
    guarded = GuardedTracker("MLflow", tracker)
    if guarded.alive and known is None:
        file.write_text(tracker.tracker.info.run_id + "\n", encoding="utf-8")
        # MLflow refuses to change a parameter, and a resumed run may have other devices.
        tracker.store_init_configuration(dict(_parameters(recipe.model_dump(mode="json"))))
    return guarded


def _parameters(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value that is not a section, with its dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _parameters(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _netrc_has_key(file: Path, base_url: str | None) -> bool:
    hosts = WANDB_HOSTS if base_url is None else (urlsplit(base_url).netloc,)
    try:
        keys = netrc.netrc(file)
    except (OSError, netrc.NetrcParseError):
        return False
    return any(keys.authenticators(host) is not None for host in hosts)
