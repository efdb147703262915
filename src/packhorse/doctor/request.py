"""Build the doctor's request: for a run, or for a folder without one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from packhorse.data.data_manifest import read_data_manifest
from packhorse.doctor.facts import DoctorRequest
from packhorse.doctor.shared_folder import plan_sha256
from packhorse.errors import UserError
from packhorse.estimate.checkpoint_size import checkpoint_space
from packhorse.launching.preflight import disk_still_needed
from packhorse.model_spec.configuration import find_configuration
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.locate import path_of


def request_for_run(plan: RunPlan, scratch: str, fast: bool) -> DoctorRequest:
    """Return what a run needs: its nodes, its folder, disk space for its checkpoints, its weights and data."""
    topology, recipe, data = plan.topology, plan.recipe, plan.data
    manifest = read_data_manifest(Path(data.folder)) if data is not None else None
    shape = read_shape(find_configuration(recipe, manifest.vocab_size if manifest is not None else None))
    checkpoint = checkpoint_space(plan, shape) if shape is not None else None
    model_folder = (plan.base_model or "") if recipe.model.path is not None else ""
    folder = Path(plan.run_folder)
    return DoctorRequest(
        num_nodes=topology.num_nodes,
        gpus_per_node=topology.processes_per_node if topology.device == "cuda" else 0,
        folder=str(folder),
        token=secrets.token_hex(8),
        plan_sha256=plan_sha256(folder),
        needed_bytes=disk_still_needed(plan, checkpoint).total_bytes if checkpoint is not None else 0,
        weights_bytes=_weights_bytes(model_folder),
        model_folder=model_folder,
        model_id=recipe.model.id or "",
        model_revision=recipe.model.revision,
        data_folder=data.folder if data is not None else "",
        scratch=scratch,
        wandb=recipe.track.wandb,
        fast=fast,
        **_master(),
    )


def request_for_folder(folder: Path, num_nodes: int, gpus_per_node: int, scratch: str, fast: bool) -> DoctorRequest:
    """Return what any run needs: nodes, GPUs, network, and a shared folder."""
    return DoctorRequest(
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        folder=str(folder.absolute()),
        token=secrets.token_hex(8),
        scratch=scratch,
        fast=fast,
        **_master(),
    )


def _weights_bytes(model_folder: str) -> int:
    """Return the size of the weights; 0 if this machine does not see them."""
    try:
        folder = path_of(model_folder)
    except UserError:  # the path names a variable that only the nodes have
        return 0
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if model_folder else 0


def _master() -> dict[str, str | int]:
    """Return address and port that the job script has set for the ranks; without them the nodes choose."""
    port = os.environ.get("MASTER_PORT", "")
    return {"master_addr": os.environ.get("MASTER_ADDR", ""), "master_port": int(port) if port.isdecimal() else 0}
