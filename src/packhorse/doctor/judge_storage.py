"""Rows about the shared folder, disks, weights, data and W&B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from packhorse.doctor.facts import NodeFacts, Question
from packhorse.doctor.rows import Row
from packhorse.durable import size

LOW_SCRATCH_BYTES: Final = 5e9
"""A built DeepSpeed operator, and what libraries put into a temporary folder."""


def folder_row(question: Question, nodes: Sequence[NodeFacts]) -> Row:
    """Is the folder the same one everywhere?"""
    fix = "set runs_folder to a folder on a disk that all nodes mount under the same path (NFS, Lustre, GPFS)."
    for node in nodes:
        facts = node.folder
        if not facts.exists:
            return Row("shared folder", "broken", f"{node.host} has no folder {question.folder}", fix)
        if question.plan_sha256 and facts.plan_sha256 != question.plan_sha256:
            sees = "another plan.json" if facts.plan_sha256 else "no plan.json"
            return Row("shared folder", "broken", f"{node.host} sees {sees} in {question.folder}", fix)
    for node in nodes:
        facts = node.folder
        if facts.write_error:
            continue  # the row of the disk says it
        if not facts.sees_start:
            fact = f"{node.host} does not see in {question.folder} what was written there before it was asked"
            return Row("shared folder", "broken", f"{fact} (it lies on {facts.kind} there)", fix)
        writers = [other for other in nodes if other.node_id in node.network.met and not other.folder.write_error]
        unseen = [other.host for other in writers if other.node_id not in facts.sees]
        if unseen:
            fact = f"{node.host} does not see in {question.folder} what {', '.join(unseen[:4])} wrote there"
            return Row("shared folder", "broken", f"{fact} (it lies on {facts.kind} there)", fix)
    unlocked = [node for node in nodes if node.folder.lock_error]
    if unlocked:
        fact = f"{unlocked[0].host} cannot lock a file in {question.folder}: {unlocked[0].folder.lock_error}"
        return Row("shared folder", "note", fact, "prepare data on one node at a time: packhorse locks it with flock.")
    kinds = ", ".join(dict.fromkeys(node.folder.kind for node in nodes))
    met = question.num_nodes > 1 and all(len(node.network.met) == question.num_nodes for node in nodes)
    whom = "each node sees what every other wrote" if met else "each node sees what was written before it was asked"
    return Row("shared folder", "ok", f"{question.folder} ({kinds}): {whom}")


def rename_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Does a rename replace a file at once, for readers on other nodes too? Checkpoints stand on that."""
    reads = sum(node.folder.rename_reads for node in nodes)
    broken = [node for node in nodes if node.folder.rename_faults]
    if broken:
        facts = broken[0].folder
        return Row(
            "rename",
            "broken",
            f"while a file was replaced by rename, {broken[0].host} found in {facts.rename_faults:,} of "
            f"{facts.rename_reads:,} reads: {facts.rename_fault}",
            "set runs_folder to a file system with POSIX renames; object stores mounted as folders have none.",
        )
    if question.fast or question.num_nodes == 1:
        return None
    if not reads:
        return Row("rename", "not tried", "no other node read the file; see above")
    stale = [node for node in nodes if node.folder.rename_fault]
    if stale:
        said = f"{stale[0].host} got a {stale[0].folder.rename_fault} on a file that was replaced while it read it"
        return Row("rename", "note", said, "NFS does so; packhorse status may have to be typed again.")
    return Row("rename", "ok", f"{reads:,} reads while the file was replaced: always whole")


def disk_row(question: Question, nodes: Sequence[NodeFacts]) -> Row:
    """Can the folder be written, and will the checkpoints fit?"""
    failed = [node for node in nodes if node.folder.write_error]
    least = min(nodes, key=lambda node: node.folder.free_bytes)
    free = f"{size(least.folder.free_bytes)} are free"
    if failed:
        return Row(
            "disk",
            "broken",
            f"{failed[0].host} cannot write to {question.folder}: {failed[0].folder.write_error}; {free}",
            "free space there (`quota -s` shows a quota), or set runs_folder to a larger disk.",
        )
    if least.folder.free_bytes < question.needed_bytes:
        return Row(
            "disk",
            "broken",
            f"{free} in {question.folder}, and the checkpoints need {size(question.needed_bytes)}",
            f"free {size(question.needed_bytes - least.folder.free_bytes)} there, lower checkpoint.keep_last, or set "
            "runs_folder to a larger disk.",
        )
    speed = nodes[0].folder.write_bytes_per_second
    needed = f", {size(question.needed_bytes)} are needed" if question.needed_bytes else ""
    return Row("disk", "ok", free + needed + (f"; {nodes[0].host} writes {size(speed)}/s" if speed else ""))


def scratch_row(question: Question, nodes: Sequence[NodeFacts]) -> Row:
    """Has each node room for what is its own?"""
    failed = [node for node in nodes if node.room.scratch_error]
    if failed:
        return Row(
            "scratch",
            "broken",
            f"{failed[0].host} cannot write to its scratch folder: {failed[0].room.scratch_error}",
            "set scratch in the site profile, or TMPDIR, to a folder of the nodes' own that can be written.",
        )
    least = min(nodes, key=lambda node: node.room.scratch_free_bytes)
    memory = ", which is memory" if least.room.scratch_kind == "tmpfs" else ""
    said = f"{least.room.scratch} of {least.host} has {size(least.room.scratch_free_bytes)} free{memory}"
    if least.room.scratch_free_bytes < LOW_SCRATCH_BYTES:
        fix = "free space there, or set scratch in the site profile to a larger disk of the node."
        return Row("scratch", "note", said, fix)
    return Row("scratch", "ok", said)


def model_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Are the weights where they will be read?"""
    if not question.model_folder and not question.model_id:
        return None
    for node in nodes:
        if node.store.model_fault:
            fetch = (
                f"hf download {question.model_id}" if question.model_id else f"put them into {question.model_folder}"
            )
            return Row(
                "weights",
                "note" if node.store.may_fetch else "broken",
                f"on {node.host}: {node.store.model_fault}",
                f"fetch them before the job, where all nodes see them: {fetch}; HF_HOME says where the cache is.",
            )
    return Row("weights", "ok", nodes[0].store.model_found)


def data_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Is the prepared data whole on every node?"""
    if not question.data_folder:
        return None
    for node in nodes:
        if node.store.data_fault:
            return Row(
                "data",
                "broken",
                f"on {node.host}: {node.store.data_fault}",
                "prepare it where all nodes see it: packhorse prepare RUN/recipe.yaml.",
            )
    return Row("data", "ok", f"whole, in {question.data_folder}")


def wandb_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Will W&B be reached from where rank 0 runs?"""
    host = nodes[0].store.wandb_host
    if question.wandb == "off" or (question.fast and not host):
        return None
    if not host:
        return Row("W&B", "ok", "offline: RUN/wandb keeps the figures, `wandb sync` sends them later")
    if nodes[0].store.wandb_error:
        return Row(
            "W&B",
            "note",
            f"{nodes[0].host} does not reach {host}: {nodes[0].store.wandb_error}",
            "set track.wandb to offline, and send the figures later: wandb sync RUN/wandb/offline-run-*.",
        )
    return Row("W&B", "ok", f"{host} is reached from {nodes[0].host}")
