"""YAML files that start a plan elsewhere: a SkyPilot task, a Kubeflow TrainJob or PyTorchJob.

Sources: SkyPilot 0.14 (distributed jobs, task YAML); Kubeflow Trainer 2.3 (trainer.kubeflow.org/v1alpha1, whose torch
plugin sets PET_*); Kubeflow Training Operator 1.9 (kubeflow.org/v1, pkg/controller.v1/pytorch/envvar.go). tests/golden
validates the files with the published schemas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from packhorse.errors import UserError
from packhorse.estimate.gpus import known_gpus
from packhorse.launching.places.node_commands import DEFAULT_PORT
from packhorse.plan.run_plan import RunPlan

START: Final = ("python", "-m", "packhorse.launching.places.start")
GPU_RESOURCE: Final = "nvidia.com/gpu"
GRACE_SECONDS: Final = 600
"""Seconds between SIGTERM and SIGKILL of a pod: time for a step, and for saving a large model."""
MAX_RESTARTS: Final = 20
"""Restarts of pods that end before the run does; each resumes from the newest checkpoint."""
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")
VOLUME = re.compile(r"([a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?):(/[A-Za-z0-9._@+,=/-]+)")
PATH = re.compile(r"/[A-Za-z0-9._@+,=/-]+")
MAX_NAME_LENGTH: Final = 50
"""A DNS name may have 63 characters; Kubernetes appends the rest."""

YamlObject = dict[str, Any]


@dataclass(frozen=True)
class ContainerSettings:
    """Image and volume of the containers that run a plan.

    Attributes:
        image: Container image with Packhorse.
        volume: Name of the volume that all nodes share.
        mount: Absolute folder that it is mounted at, in every container.
    """

    image: str
    volume: str
    mount: str


def read_container_settings(plan: RunPlan, image: str, volume: str) -> ContainerSettings:
    """Check `--image` and `--volume NAME:/FOLDER`, which have strict patterns.

    Raises:
        UserError: One of them is missing or malformed, or the run reads or writes outside the volume.
    """
    if not IMAGE.fullmatch(image):
        raise UserError(
            f"--image is {image!r}.",
            "every node starts the same container image, which holds Packhorse.",
            "give the name of an image, for example --image registry.example/packhorse:0.1.",
        )
    match = VOLUME.fullmatch(volume)
    if match is None:
        raise UserError(
            f"--volume is {volume!r}.",
            "run folder, data and weights must be on a volume that all nodes mount.",
            "give its name and folder, for example --volume training:/mnt/training.",
        )
    mount = match[2].rstrip("/")
    paths = {"the run folder": plan.run_folder}
    if plan.data is not None:
        paths["the prepared data"] = plan.data.folder
    if plan.recipe.model.path is not None and plan.base_model is not None:
        paths["the model"] = plan.base_model
    for what, path in paths.items():
        if not Path(path).is_relative_to(mount) or not PATH.fullmatch(path):
            raise UserError(
                f"{what} is {path!r}, which is not below {mount}.",
                "the containers see only their image and the volume, and the file takes plain paths only.",
                f"plan it there: runs_folder={mount}/runs, with the model and the rows below {mount}.",
            )
    return ContainerSettings(image, match[1], mount)


def dns_name(plan: RunPlan) -> str:
    """Return the run's name as a DNS label (RFC 1123): lower-case letters, digits and dashes."""
    name = re.sub(r"[^a-z0-9]+", "-", plan.recipe.name.lower())[:MAX_NAME_LENGTH].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".rstrip("-")


def sky_task(plan: RunPlan, settings: ContainerSettings) -> YamlObject:
    """Return a task for `sky launch` or `sky jobs launch`.

    Raises:
        UserError: The plan names no GPU that SkyPilot knows.
    """
    topology = plan.topology
    run = f'exec {" ".join(START)} {plan.run_folder} "$SKYPILOT_NODE_RANK" "$master_addr" {DEFAULT_PORT}'
    return {
        "name": dns_name(plan),
        "num_nodes": topology.num_nodes,
        "resources": {**_sky_devices(plan), "image_id": f"docker:{settings.image}"},
        "volumes": {settings.mount: settings.volume},
        "envs": {"HF_HUB_OFFLINE": "1"},
        "run": f'master_addr=$(echo "$SKYPILOT_NODE_IPS" | head -n1)\n{run}\n',
    }


def train_job(plan: RunPlan, settings: ContainerSettings) -> YamlObject:
    """Return a TrainJob of Kubeflow Trainer with the runtime `torch-distributed`."""
    topology = plan.topology
    pod = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "volumes": _volumes(settings),
        "containers": [{"name": "node", "volumeMounts": _mounts(settings)}],
    }
    patch = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": dns_name(plan)},
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": "torch-distributed",
            },
            "trainer": {
                "image": settings.image,
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


def pytorch_job(plan: RunPlan, settings: ContainerSettings) -> YamlObject:
    """Return a PyTorchJob of the Kubeflow Training Operator: one master, and one worker per further node."""
    topology = plan.topology
    container = {
        "name": "pytorch",
        "image": settings.image,
        "command": _command(plan, "$(PET_NODE_RANK)", "$(MASTER_ADDR)", "$(MASTER_PORT)"),
        "env": _env(),
        "resources": _resources(plan),
        "volumeMounts": _mounts(settings),
    }
    pod = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": _volumes(settings),
    }
    replica = {"restartPolicy": "OnFailure", "template": {"spec": pod}}
    replicas = {"Master": {"replicas": 1, **replica}}
    if topology.num_nodes > 1:
        replicas["Worker"] = {"replicas": topology.num_nodes - 1, **replica}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": dns_name(plan)},
        "spec": {
            "nprocPerNode": str(topology.processes_per_node),
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": MAX_RESTARTS},
            "pytorchReplicaSpecs": replicas,
        },
    }


KINDS: Final[Mapping[str, Callable[[RunPlan, ContainerSettings], YamlObject]]] = {
    "sky": sky_task,
    "trainjob": train_job,
    "pytorchjob": pytorch_job,
}
USES: Final = {
    "sky": "sky jobs launch FILE",
    "trainjob": "kubectl create -f FILE",
    "pytorchjob": "kubectl create -f FILE",
}


def task_file(kind: str, plan: RunPlan, settings: ContainerSettings) -> str:
    """Return the file as YAML; comments at its top say what it needs.

    Raises:
        UserError: `kind` is sky, and the plan names no GPU that SkyPilot knows.
    """
    topology = plan.topology
    nodes = "1 node" if topology.num_nodes == 1 else f"{topology.num_nodes} nodes"
    lines = [
        f"# {plan.recipe.name} on {nodes} x {topology.processes_per_node} processes: {USES[kind]}",
        f"# First, in the same image with the same volume at {settings.mount}, and without GPUs:",
        "#   packhorse plan RECIPE --gpus … --nodes … --write   creates the run folder and prepares its data",
        "# Starting this file again resumes the run from its newest checkpoint.",
    ]
    return "\n".join(lines) + "\n" + yaml.dump(KINDS[kind](plan, settings), Dumper=_Dumper, sort_keys=False, width=110)


class _Dumper(yaml.SafeDumper):
    """Dumper that writes multi-line text as a block, and no anchors for repeated parts."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def _sky_devices(plan: RunPlan) -> YamlObject:
    topology = plan.topology
    if topology.device == "cpu":
        return {"cpus": f"{topology.processes_per_node * topology.threads_per_process}+"}
    kind = plan.predicted.gpu if plan.predicted is not None else ""
    names = {name: gpu.sky for name, gpu in known_gpus().items() if gpu.sky}
    if kind not in names:
        raise UserError(
            f"the plan is for {topology.world_size} GPUs" + (f" named {kind}." if kind else ", without a name."),
            f"SkyPilot finds machines by the name of the GPU; it knows {', '.join(names)}.",
            "plan for one of them, for example --gpus 16xH100-80GB.",
        )
    return {"accelerators": f"{names[kind]}:{topology.processes_per_node}"}


def _command(plan: RunPlan, rank: str, address: str, port: str) -> list[str]:
    """Return the argument list; Kubernetes itself, without a shell, replaces `$(NAME)`."""
    return [*START, plan.run_folder, rank, address, port]


def _env() -> list[YamlObject]:
    return [{"name": "HF_HUB_OFFLINE", "value": "1"}]


def _resources(plan: RunPlan) -> YamlObject:
    topology = plan.topology
    if topology.device == "cuda":
        return {"limits": {GPU_RESOURCE: str(topology.processes_per_node)}}
    return {"requests": {"cpu": str(topology.processes_per_node * topology.threads_per_process)}}


def _volumes(settings: ContainerSettings) -> list[YamlObject]:
    return [
        {"name": "shared", "persistentVolumeClaim": {"claimName": settings.volume}},
        # The default of 64 MiB in a container is too small for NCCL.
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


def _mounts(settings: ContainerSettings) -> list[YamlObject]:
    return [{"name": "shared", "mountPath": settings.mount}, {"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
