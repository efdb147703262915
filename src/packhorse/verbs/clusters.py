"""Words of the verbs that look at machines beside the run's own."""

from __future__ import annotations

from packhorse.verbs.words import Action, count_of, overrides_of, switch_of


def doctor(
    run: str = "",
    site: str = "",
    nodes: str = "",
    gpus_per_node: str = "",
    fast: str = "False",
    dry_run: str = "False",
) -> Action:
    """Find what would break a run before it takes GPUs: here, in the job that you stand in, or on a cluster's nodes.

    packhorse doctor [RUN]                               this machine; inside a job, all of its nodes
    packhorse doctor [RUN] --site SITE [--nodes 2]       nodes of a cluster, in a job of three minutes

    --gpus-per-node N: in place of the site's. --fast: without bandwidth, renames and W&B. --dry-run: the command alone.
    Exit code 1 where a row is broken; the first one is named below the table.
    """
    sizes = {"nodes": count_of("nodes", nodes), "gpus_per_node": count_of("gpus-per-node", gpus_per_node, at_least=0)}
    switches = {"fast": switch_of("fast", fast), "dry_run": switch_of("dry-run", dry_run)}
    return Action("doctor", "doctor", {"run": run, "site": site, **sizes, **switches})


def manifest(
    recipe: str,
    *overrides: str,
    to: str = "",
    image: str = "",
    volume: str = "",
    gpus: str = "",
    nodes: str = "",
    **more: str,
) -> Action:
    """Print a run for other places: a SkyPilot task, or a Kubeflow TrainJob or PyTorchJob, from the same plan.

    packhorse manifest RUN --to sky|trainjob|pytorchjob --image IMAGE --volume NAME:/FOLDER
    packhorse manifest RECIPE --to … --image … --volume … --gpus 16xH100-80GB --nodes 2 [key=value …]

    --volume: a volume that all nodes share, and the folder it is mounted at; the run folder lies below it.
    `packhorse plan RECIPE --argv --nodes 2` gives a line per node for machines without a scheduler.
    """
    words = overrides_of(overrides, more, ("to", "image", "volume", "gpus", "nodes"))
    asked = {"to": to, "image": image, "volume": volume, "gpus": gpus, "nodes": count_of("nodes", nodes)}
    return Action("manifest", "manifest", {"recipe": recipe, "overrides": words, **asked})
