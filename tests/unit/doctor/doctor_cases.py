"""Answers of two sound nodes with two GPUs each; tests break one thing."""

from __future__ import annotations

from packhorse.doctor.facts import (
    BandwidthFacts,
    DoctorRequest,
    FolderFacts,
    Gpu,
    GpuFacts,
    InputFacts,
    InterfaceChoice,
    NetworkFacts,
    NodeFacts,
    ResourceFacts,
)

GB = 10**9
REQUEST = DoctorRequest(
    num_nodes=2,
    gpus_per_node=2,
    folder="/shared/runs/first",
    token="0" * 16,
    plan_sha256="a" * 64,
    needed_bytes=50 * GB,
    weights_bytes=16 * GB,
    model_id="org/model",
    data_folder="/shared/data/0123",
    wandb="auto",
)


def sound_node(node_id: int) -> NodeFacts:
    choices = tuple(
        InterfaceChoice(library=name, interface="ib0", address=f"10.0.0.{node_id + 1}") for name in ("gloo", "nccl")
    )
    return NodeFacts(
        node_id=node_id,
        host=f"gpu{node_id + 1}",
        versions={"python": "3.11.2", "packhorse": "0.1.0", "torch": "2.13.0+cu128", "nvidia-nccl-cu12": "2.27.5"},
        gpu=GpuFacts(
            gpus=tuple(Gpu(index=str(number), name="H100", memory_mib=81559, used_mib=4) for number in range(2)),
            installed=2,
            driver_cuda="12.9",
            torch_cuda="12.8",
        ),
        network=NetworkFacts(
            choices=choices,
            interfaces={"lo": "127.0.0.1", "eth0": f"192.168.0.{node_id + 1}", "ib0": f"10.0.0.{node_id + 1}"},
            master_addr="gpu1",
            master_port=20123,
            resolved="192.168.0.1",
            met_nodes=(0, 1),
            num_connections=1,
            clock_skew_seconds=0.002 * node_id,
            link_mbit=400_000,
        ),
        folder=FolderFacts(
            exists=True,
            kind="lustre",
            plan_sha256="a" * 64,
            sees_request_file=True,
            sees_nodes=(0, 1),
            free_bytes=900 * GB,
            write_bytes_per_second=1.5 * GB if node_id == 0 else None,
            rename_reads=400 * node_id,
        ),
        resources=ResourceFacts(
            scratch="/tmp",
            scratch_free_bytes=200 * GB,
            scratch_kind="ext4",
            shm_bytes=64 * GB,
            memory_bytes=500 * GB,
            memory_from="its Slurm job",
            infiniband=True,
        ),
        inputs=InputFacts(model_found="/shared/hf/model", wandb_host="api.wandb.ai" if node_id == 0 else ""),
        bandwidth=BandwidthFacts(
            world_size=4,
            backend="nccl",
            small_bytes=8192,
            small_seconds=40e-6,
            large_bytes=2**28,
            bus_bytes_per_second=42 * GB,
        )
        if node_id == 0
        else BandwidthFacts(),
    )


def sound_nodes() -> list[NodeFacts]:
    return [sound_node(0), sound_node(1)]
