"""Rows about the shared folder, disks, weights, data and W&B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from packhorse.doctor.facts import DoctorRequest, NodeFacts
from packhorse.doctor.table import Row, broken, not_tried, note, ok
from packhorse.durable import size

LOW_SCRATCH_BYTES: Final = 5e9
"""Space for a compiled DeepSpeed operator and temporary files of libraries."""


def folder_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Check that the folder is the same one on all nodes."""
    fix = "set runs_folder to a folder on a disk that all nodes mount under the same path (NFS, Lustre, GPFS)."
    for node in nodes:
        facts = node.folder
        if not facts.exists:
            return broken(f"{node.host} has no folder {request.folder}", fix)
        if request.plan_sha256 and facts.plan_sha256 != request.plan_sha256:
            sees = "another plan.json" if facts.plan_sha256 else "no plan.json"
            return broken(f"{node.host} sees {sees} in {request.folder}", fix)
    for node in nodes:
        facts = node.folder
        if facts.write_error:
            continue  # the row `disk` reports it
        if not facts.sees_request_file:
            fact = f"{node.host} does not see in {request.folder} a file that was written there before the checks"
            return broken(f"{fact} (the file system there is {facts.kind})", fix)
        writers = [other for other in nodes if other.node_id in node.network.met_nodes and not other.folder.write_error]
        unseen = [other.host for other in writers if other.node_id not in facts.sees_nodes]
        if unseen:
            fact = f"{node.host} does not see in {request.folder} the file of {', '.join(unseen[:4])}"
            return broken(f"{fact} (the file system there is {facts.kind})", fix)
    unlocked = [node for node in nodes if node.folder.lock_error]
    if unlocked:
        fact = f"{unlocked[0].host} cannot lock a file in {request.folder}: {unlocked[0].folder.lock_error}"
        return note(fact, "prepare data on one node at a time: packhorse locks it with flock.")
    kinds = ", ".join(dict.fromkeys(node.folder.kind for node in nodes))
    all_met = request.num_nodes > 1 and all(len(node.network.met_nodes) == request.num_nodes for node in nodes)
    files = "the files of all others" if all_met else "the file that was written before the checks"
    return ok(f"{request.folder} ({kinds}): every node sees {files}")


def rename_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row | None:
    """Check that a rename is atomic for readers on other nodes, which checkpoints require."""
    reads = sum(node.folder.rename_reads for node in nodes)
    faulty = [node for node in nodes if node.folder.rename_faults]
    if faulty:
        facts = faulty[0].folder
        return broken(
            f"while a file was replaced by rename, {faulty[0].host} found in {facts.rename_faults:,} of "
            f"{facts.rename_reads:,} reads: {facts.rename_fault}",
            "set runs_folder to a file system with POSIX renames; object stores mounted as folders have none.",
        )
    if request.fast or request.num_nodes == 1:
        return None
    if not reads:
        return not_tried("no other node read the file; see above")
    stale = [node for node in nodes if node.folder.rename_fault]
    if stale:
        fact = f"{stale[0].host} got a {stale[0].folder.rename_fault} on a file that was replaced while it was read"
        return note(fact, "normal for NFS; repeat `packhorse status` if it fails once.")
    return ok(f"{reads:,} reads while the file was replaced: always complete")


def disk_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Check that the folder can be written, and has space for the checkpoints."""
    failed = [node for node in nodes if node.folder.write_error]
    least = min(nodes, key=lambda node: node.folder.free_bytes)
    free = f"{size(least.folder.free_bytes)} are free"
    if failed:
        return broken(
            f"{failed[0].host} cannot write to {request.folder}: {failed[0].folder.write_error}; {free}",
            "free space there (`quota -s` shows a quota), or set runs_folder to a larger disk.",
        )
    if least.folder.free_bytes < request.needed_bytes:
        return broken(
            f"{free} in {request.folder}, and the checkpoints need {size(request.needed_bytes)}",
            f"free {size(request.needed_bytes - least.folder.free_bytes)} there, lower checkpoint.keep_last, or set "
            "runs_folder to a larger disk.",
        )
    speed = nodes[0].folder.write_bytes_per_second
    needed = f", {size(request.needed_bytes)} are needed" if request.needed_bytes else ""
    return ok(free + needed + (f"; {nodes[0].host} writes {size(speed)}/s" if speed else ""))


def scratch_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Check the local scratch folder of each node."""
    failed = [node for node in nodes if node.resources.scratch_error]
    if failed:
        return broken(
            f"{failed[0].host} cannot write to its scratch folder: {failed[0].resources.scratch_error}",
            "set scratch in the site profile, or TMPDIR, to a local folder that can be written.",
        )
    least = min(nodes, key=lambda node: node.resources.scratch_free_bytes)
    in_memory = ", in memory" if least.resources.scratch_kind == "tmpfs" else ""
    fact = f"{least.resources.scratch} of {least.host} has {size(least.resources.scratch_free_bytes)} free{in_memory}"
    if least.resources.scratch_free_bytes < LOW_SCRATCH_BYTES:
        fix = "free space there, or set scratch in the site profile to a larger disk of the node."
        return note(fact, fix)
    return ok(fact)


def model_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row | None:
    """Check that every node finds the weights."""
    if not request.model_folder and not request.model_id:
        return None
    for node in nodes:
        if node.inputs.model_fault:
            fetch = f"hf download {request.model_id}" if request.model_id else f"copy them to {request.model_folder}"
            return Row(
                "note" if node.inputs.may_fetch else "broken",
                f"on {node.host}: {node.inputs.model_fault}",
                f"download them before the job, to a place that all nodes see: {fetch}; HF_HOME sets the cache folder.",
            )
    return ok(nodes[0].inputs.model_found)


def data_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row | None:
    """Check that every node finds the prepared data complete."""
    if not request.data_folder:
        return None
    for node in nodes:
        if node.inputs.data_fault:
            return broken(
                f"on {node.host}: {node.inputs.data_fault}",
                "prepare it in a folder that all nodes see: packhorse prepare RUN/recipe.yaml.",
            )
    return ok(f"complete, in {request.data_folder}")


def wandb_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row | None:
    """Check that the node of rank 0 reaches W&B."""
    host = nodes[0].inputs.wandb_host
    if request.wandb == "off" or (request.fast and not host):
        return None
    if not host:
        return ok("offline: RUN/wandb keeps the metrics, `wandb sync` uploads them later")
    if nodes[0].inputs.wandb_error:
        return note(
            f"{nodes[0].host} cannot reach {host}: {nodes[0].inputs.wandb_error}",
            "set track.wandb to offline, and upload the metrics later: wandb sync RUN/wandb/offline-run-*.",
        )
    return ok(f"{nodes[0].host} reaches {host}")
