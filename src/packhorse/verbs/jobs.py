"""Verbs about runs under way, here or as jobs of a cluster."""

from __future__ import annotations

from typing import Any

from packhorse.errors import UserError
from packhorse.verbs.words import Action, count_of, overrides_of, switch_of

ASKED = ("nodes", "gpus-per-node", "site", "time", "dry-run", "force")
"""Flags of verbs that submit."""


def status(run: str) -> Action:
    """Show a run's state, its jobs, its last figures, its attempts, and what was lost; of a sweep a line a run.

    packhorse status RUN
    """
    return Action("status", "status", {"run": run})


def logs(run: str, *, rank: str = "", follow: str = "False") -> Action:
    """Print what a run's newest attempt said: its job, its launcher and rank 0, or one rank alone.

    packhorse logs RUN [--rank 3] [--follow]

    --follow: go on with what is added until the run ends.
    """
    if rank and not rank.isdecimal():
        raise UserError(f"--rank is {rank}.", "ranks are counted from 0.", "give a whole number, for example --rank 0.")
    return Action(
        "logs", "logs", {"run": run, "rank": int(rank) if rank else None, "follow": switch_of("follow", follow)}
    )


def cancel(run: str, *, now: str = "False") -> Action:
    """End a run resumably: one that trains saves and stops, and its jobs that wait leave the queue.

    packhorse cancel RUN [--now]

    --now: at once, without a save.
    """
    return Action("cancel", "cancel", {"run": run, "now": switch_of("now", now)})


def resume(run: str, *overrides: str, gpus: str = "", restarts: str = "", force: str = "False", **more: str) -> Action:
    """Go on with a run the way it was started: its jobs that did not end well are submitted again, or it trains here.

    packhorse resume RUN
    packhorse resume RUN [--gpus 2] [--restarts 3] [--force] [parallel.engine=zero3 …]

    --gpus, --restarts, --force, overrides: as for packhorse train RUN --resume; of a run that was trained here.
    """
    arguments = {"run": run, "overrides": overrides_of(overrides, more, ("gpus", "restarts", "force"))}
    again = {"gpus": count_of("gpus", gpus), "restarts": count_of("restarts", restarts, at_least=0)}
    return Action("resume", "resume", arguments | again | {"force": switch_of("force", force)})


def submit(
    recipe: str,
    *overrides: str,
    nodes: str = "",
    gpus_per_node: str = "",
    site: str = "",
    time: str = "",
    array: str = "",
    at_once: str = "",
    dry_run: str = "False",
    force: str = "False",
    **more: str,
) -> Action:
    """Submit a recipe to a Slurm cluster as a run that comes back by itself, or go on with a run there.

    packhorse submit RECIPE [--nodes 2] [--gpus-per-node 8] [--site site.yaml] [--time 24:00:00] [key=value …]
    packhorse submit RUN [--nodes 2] [--gpus-per-node 8] [--time 24:00:00] [parallel.engine=zero3 …]
    packhorse submit RECIPE --array seed=1,2,3             a run for each value, as one job array; so does `sweep:`
    packhorse submit RECIPE --site university --dry-run    prints the job script and the commands, runs nothing

    --site FILE|NAME: what the cluster is like, ./site.yaml if not given; `packhorse site` writes a first one.
    --time T: limit of one job; a run that takes longer goes on in the next. --force: even if the GPUs cannot hold it.
    --at-once N: with --array or `sweep:`, so many runs at the same time.
    """
    asked = _asked(nodes, gpus_per_node, site, time, dry_run, force)
    asked["at_once"] = count_of("at-once", at_once)
    words = [*overrides_of(overrides, more, (*ASKED, "array", "at-once")), *_array(array)]
    return Action("submit", "submit", {"recipe": recipe, "overrides": words, "asked": asked})


def pipeline(
    recipe: str,
    *overrides: str,
    nodes: str = "",
    gpus_per_node: str = "",
    site: str = "",
    time: str = "",
    dry_run: str = "False",
    force: str = "False",
    **more: str,
) -> Action:
    """Submit a recipe with what comes after: prepare, train, evaluate, verify, each once the one before ended well.

    packhorse pipeline RECIPE [--nodes 2] [--gpus-per-node 8] [--site site.yaml] [--time 24:00:00] [key=value …]
    packhorse pipeline RECIPE --dry-run    prints the job scripts and the commands, runs nothing

    Flags: as for packhorse submit. Where a job fails the rest do not run, and packhorse resume goes on from there.
    """
    asked = _asked(nodes, gpus_per_node, site, time, dry_run, force)
    words = overrides_of(overrides, more, ASKED)
    return Action("pipeline", "pipeline", {"recipe": recipe, "overrides": words, "asked": asked})


def site(target: str = "site.yaml", partition: str = "", name: str = "") -> Action:
    """Write a first profile of this cluster by asking Slurm, each line explained.

    packhorse site [site.yaml] [--partition gpu] [--name mycluster]
    """
    return Action("site", "site", {"target": target, "partition": partition, "name": name})


def _asked(nodes: str, gpus_per_node: str, site: str, time: str, dry_run: str, force: str) -> dict[str, Any]:
    return {
        "nodes": count_of("nodes", nodes),
        "gpus_per_node": count_of("gpus-per-node", gpus_per_node),
        "site": site,
        "time": time,
        "dry_run": switch_of("dry-run", dry_run),
        "force": switch_of("force", force),
    }


def _array(text: str) -> list[str]:
    """`seed=1,2,3` as an override of the recipe's `sweep`."""
    key, equals, values = text.partition("=")
    if text and not (key and equals and values):
        raise UserError(
            f"--array is {text}.",
            "it says which field is varied, and over which values.",
            "write it as --array seed=1,2,3.",
        )
    return [f"sweep.grid.{key}=[{values}]"] if text else []
