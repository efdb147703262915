"""W&B and TensorBoard, through accelerate's trackers.

A module of its own, which only the worker imports: accelerate brings torch, which `packhorse status` must not pay for.
accelerate itself imports wandb and tensorboard inside `start`, so neither is loaded unless a recipe asks for it.
"""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from accelerate.state import is_initialized
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from packhorse.recipe.schema import Recipe
from packhorse.run_folder.layout import WANDB_ID_FILE
from packhorse.track.meter import Figures

WANDB_HOSTS: Final = ("api.wandb.ai", "api.forge.coreweave.com")
TIMEOUT_SECONDS: Final = 30.0

logger = logging.getLogger(__name__)


class GuardedTracker:
    """A tracker that may fail without ending the run: one warning, then silence; metrics.jsonl has every figure."""

    def __init__(self, name: str, tracker: GeneralTracker) -> None:
        """Starts the tracker.

        Args:
            name: What the warning calls it.
            tracker: Not yet started.
        """
        self._name = name
        self._tracker = tracker
        self.alive = True
        self._attempt(tracker.start)

    def log(self, step: int, figures: Figures) -> None:
        """Hands the figures on."""
        self._attempt(lambda: self._tracker.log(figures, step=step))

    def close(self) -> None:
        """Finishes."""
        self._attempt(self._tracker.finish)

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self.alive:
            return
        try:
            action()
        except Exception as error:
            # Any exception: a tracker's own errors are of many types, and none is worth a training run.
            self.alive = False
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s is off for this run (%s); figures go on to metrics.jsonl.", self._name, reason)


def open_trackers(
    recipe: Recipe, run_folder: Path, first_step: int, facts: Mapping[str, Any] | None = None
) -> list[GuardedTracker]:
    """Starts what the recipe asks for; call it on rank 0 only, after the Accelerator was made.

    Args:
        recipe: Its `track` section decides; the whole of it, with `${env:NAME}` unexpanded, is W&B's config.
        run_folder: RUN; W&B writes to RUN/wandb and RUN/wandb_id.txt, TensorBoard to RUN/tensorboard.
        first_step: First step that this attempt will log.
        facts: What W&B's config shows beside the recipe, such as the data's ledger.
    """
    # accelerate's trackers log through its state; without one each would fail, and be taken for a missing network.
    if not is_initialized():
        raise RuntimeError("the Accelerator must be made before the trackers")
    trackers = []
    mode = wandb_mode(recipe.track.wandb, os.environ, Path.home() / ".netrc")
    if mode is not None:
        trackers.append(open_wandb(recipe, run_folder, mode, facts))
    if recipe.track.tensorboard:
        trackers.append(open_tensorboard(run_folder, first_step))
    return [tracker for tracker in trackers if tracker.alive]


def wandb_mode(
    choice: Literal["auto", "online", "offline", "off"], environment: Mapping[str, str], netrc_file: Path
) -> Literal["online", "offline"] | None:
    """Returns how W&B runs, None for not at all; `auto` follows WANDB_MODE, then goes online where a key is set.

    Args:
        choice: `track.wandb` of the recipe.
        environment: Environment variables.
        netrc_file: Where `wandb login` keeps keys, unless NETRC names another file.
    """
    if choice != "auto":
        return None if choice == "off" else choice
    asked = environment.get("WANDB_MODE")
    if asked == "disabled":
        return None
    has_key = bool(environment.get("WANDB_API_KEY")) or _netrc_has_key(
        Path(environment.get("NETRC", netrc_file)), environment.get("WANDB_BASE_URL")
    )
    return "online" if has_key and asked != "offline" else "offline"


def open_wandb(
    recipe: Recipe,
    run_folder: Path,
    mode: Literal["online", "offline"],
    facts: Mapping[str, Any] | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> GuardedTracker:
    """Starts or resumes the W&B run of a run folder.

    Args:
        recipe: Gives project, name and config.
        run_folder: RUN.
        mode: Upload, or keep in RUN/wandb for `wandb sync`.
        facts: What the config shows beside the recipe.
        timeout_seconds: How long the service may take to answer at the start, and to take the rest at the end.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read once, when wandb is imported
    settings = {
        "init_timeout": timeout_seconds,
        "login_timeout": timeout_seconds,
        "finish_timeout": timeout_seconds,  # without it, a network that went away holds the finished run for hours
        "finish_timeout_raises": True,
        "disable_code": True,  # neither source files nor what is not yet committed of them
        "console": "off",
        "silent": True,
    }
    tracker = WandBTracker(
        recipe.track.wandb_project,
        name=recipe.name,
        id=wandb_id(run_folder),
        resume="allow",
        mode=mode,
        dir=str(run_folder),  # wandb makes its folder `wandb` inside
        config={**recipe.model_dump(mode="json"), **(facts or {})},
        settings=settings,
    )
    guarded = GuardedTracker("W&B", tracker)
    if guarded.alive:
        logger.info("W&B: %s", tracker.tracker.url or f"offline in {run_folder / 'wandb'}; upload with `wandb sync`")
    return guarded


def wandb_id(run_folder: Path) -> str:
    """Returns the W&B id of a run folder; made once, so that a restart goes on with the same W&B run."""
    file = run_folder / WANDB_ID_FILE
    if not file.is_file():
        file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def open_tensorboard(run_folder: Path, first_step: int) -> GuardedTracker:
    """Starts TensorBoard's event file in RUN/tensorboard; events from `first_step` on are hidden as repeated.

    Args:
        run_folder: RUN.
        first_step: First step that this attempt will log.
    """
    tracker = TensorBoardTracker("tensorboard", str(run_folder), purge_step=first_step)
    # accelerate's own idea of the main process is wrong on some DeepSpeed launches; the caller is rank 0.
    tracker.main_process_only = False
    return GuardedTracker("TensorBoard", tracker)


def _netrc_has_key(file: Path, base_url: str | None) -> bool:
    hosts = WANDB_HOSTS if base_url is None else (urlsplit(base_url).netloc,)
    try:
        keys = netrc.netrc(file)
    except (OSError, netrc.NetrcParseError):
        return False
    return any(keys.authenticators(host) is not None for host in hosts)
