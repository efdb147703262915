"""The plan as a task of SkyPilot, and as a TrainJob or PyTorchJob of Kubeflow: values that print as YAML.

Sources: SkyPilot 0.14 (distributed jobs, task YAML); Kubeflow Trainer 2.3 (trainer.kubeflow.org/v1alpha1, whose torch
plugin sets PET_*); Kubeflow Training Operator 1.9 (kubeflow.org/v1, pkg/controller.v1/pytorch/envvar.go). tests/golden
checks them against the published schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import yaml

from packhorse.errors import UserError
from packhorse.launching.places.lines import DEFAULT_PORT
from packhorse.launching.places.request import PlaceRequest, name_of
from packhorse.plan.run_plan import RunPlan

START: Final = ("python", "-m", "packhorse.launching.places.start")
SKY_NAMES: Final[Mapping[str, str]] = {
    "H100-80GB": "H100",
    "H100-PCIE-80GB": "H100",
    "H200-141GB": "H200",
    "B200-180GB": "B200",
    "A100-80GB": "A100-80GB",
    "A100-40GB": "A100",
    "A100-PCIE-80GB": "A100-80GB",
    "A100-PCIE-40GB": "A100",
    "L40S-48GB": "L40S",
    "A10-24GB": "A10",
    "L4-24GB": "L4",
    "RTX-3090-24GB": "RTX3090",
    "RTX-4090-24GB": "RTX4090",
    "RTX-5090-32GB": "RTX5090",
    "MI300X-192GB": "MI300X",
}
"""What SkyPilot calls the GPUs of our table."""
GPU_RESOURCE: Final = "nvidia.com/gpu"
GRACE_SECONDS: Final = 600
"""Between SIGTERM and SIGKILL of a pod: a step, and a save of a large model."""
MOST_RESTARTS: Final = 20
"""Of pods that ended before the run did; each goes on from the newest checkpoint."""

Manifest = dict[str, Any]


def sky_task(plan: RunPlan, request: PlaceRequest) -> Manifest:
    """A task for `sky launch` or `sky jobs launch`.

    Raises:
        UserError: The plan does not say which GPUs it is for.
    """
    topology = plan.topology
    run = f'exec {" ".join(START)} {plan.run_folder} "$SKYPILOT_NODE_RANK" "$master_addr" {DEFAULT_PORT}'
    return {
        "name": name_of(plan),
        "num_nodes": topology.num_nodes,
        "resources": {**_sky_devices(plan), "image_id": f"docker:{request.image}"},
        "volumes": {request.mount: request.claim},
        "envs": {"HF_HUB_OFFLINE": "1"},
        "run": f'master_addr=$(echo "$SKYPILOT_NODE_IPS" | head -n1)\n{run}\n',
    }


def train_job(plan: RunPlan, request: PlaceRequest) -> Manifest:
    """A TrainJob of Kubeflow Trainer, on its runtime `torch-distributed`."""
    topology = plan.topology
    pod = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "volumes": _volumes(request),
        "containers": [{"name": "node", "volumeMounts": _mounts(request)}],
    }
    patch = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name_of(plan)},
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": "torch-distributed",
            },
            "trainer": {
                "image": request.image,
                "numNodes": topology.num_nodes,
                "numProcPerNode": topology.processes_per_node,
                "command": _command(plan, "$(PET_NODE_RANK)", "$(PET_MASTER_ADDR)", "$(PET_MASTER_PORT)"),
                "env": _env(),
                "resourcesPerNode": _resources(plan),
            },
            "runtimePatches": [
                {
                    "manager": "packhorse/manifest",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
                }
            ],
        },
    }


def pytorch_job(plan: RunPlan, request: PlaceRequest) -> Manifest:
    """A PyTorchJob of the Kubeflow Training Operator: one master, and a worker for each other node."""
    topology = plan.topology
    container = {
        "name": "pytorch",
        "image": request.image,
        "command": _command(plan, "$(PET_NODE_RANK)", "$(MASTER_ADDR)", "$(MASTER_PORT)"),
        "env": _env(),
        "resources": _resources(plan),
        "volumeMounts": _mounts(request),
    }
    pod = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": _volumes(request),
    }
    replica = {"restartPolicy": "OnFailure", "template": {"spec": pod}}
    replicas = {"Master": {"replicas": 1, **replica}}
    if topology.num_nodes > 1:
        replicas["Worker"] = {"replicas": topology.num_nodes - 1, **replica}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name_of(plan)},
        "spec": {
            "nprocPerNode": str(topology.processes_per_node),
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": MOST_RESTARTS},
            "pytorchReplicaSpecs": replicas,
        },
    }


KINDS: Final[Mapping[str, Callable[[RunPlan, PlaceRequest], Manifest]]] = {
    "sky": sky_task,
    "trainjob": train_job,
    "pytorchjob": pytorch_job,
}
USES: Final = {
    "sky": "sky jobs launch FILE",
    "trainjob": "kubectl create -f FILE",
    "pytorchjob": "kubectl create -f FILE",
}


def manifest_text(kind: str, plan: RunPlan, request: PlaceRequest) -> str:
    """YAML, with what must be there before it is started.

    Raises:
        UserError: As `sky_task`.
    """
    topology = plan.topology
    nodes = "1 node" if topology.num_nodes == 1 else f"{topology.num_nodes} nodes"
    lines = [
        f"# {plan.recipe.name} on {nodes} x {topology.processes_per_node} processes: {USES[kind]}",
        f"# First, in the same image and with the same volume at {request.mount}, without GPUs:",
        "#   packhorse plan RECIPE --gpus … --nodes … --write   makes the run folder and prepares its data",
        "# The same manifest again goes on from the newest checkpoint.",
    ]
    return "\n".join(lines) + "\n" + yaml.dump(KINDS[kind](plan, request), Dumper=_Dumper, sort_keys=False, width=110)


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block; no anchors where a part stands twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def _sky_devices(plan: RunPlan) -> Manifest:
    topology = plan.topology
    if topology.device == "cpu":
        return {"cpus": f"{topology.processes_per_node * topology.threads_per_process}+"}
    kind = plan.predicted.gpu if plan.predicted is not None else ""
    if kind not in SKY_NAMES:
        raise UserError(
            f"the plan is for {topology.world_size} GPUs" + (f" of kind {kind}." if kind else ", of no kind."),
            f"SkyPilot looks for machines by the GPU; known to both are {', '.join(SKY_NAMES)}.",
            "plan it for one of them, for example --gpus 16xH100-80GB.",
        )
    return {"accelerators": f"{SKY_NAMES[kind]}:{topology.processes_per_node}"}


def _command(plan: RunPlan, rank: str, address: str, port: str) -> list[str]:
    """Words, not a shell: Kubernetes puts the values of `$(NAME)` in."""
    return [*START, plan.run_folder, rank, address, port]


def _env() -> list[Manifest]:
    return [{"name": "HF_HUB_OFFLINE", "value": "1"}]


def _resources(plan: RunPlan) -> Manifest:
    topology = plan.topology
    if topology.device == "cuda":
        return {"limits": {GPU_RESOURCE: str(topology.processes_per_node)}}
    return {"requests": {"cpu": str(topology.processes_per_node * topology.threads_per_process)}}


def _volumes(request: PlaceRequest) -> list[Manifest]:
    return [
        {"name": "shared", "persistentVolumeClaim": {"claimName": request.claim}},
        # A container has 64 MiB there by default, which NCCL exceeds.
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


def _mounts(request: PlaceRequest) -> list[Manifest]:
    return [{"name": "shared", "mountPath": request.mount}, {"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
