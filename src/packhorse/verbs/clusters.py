"""Words of the verbs that look at machines beside the run's own."""

from __future__ import annotations

from packhorse.verbs.words import Action, count_of, switch_of


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
