"""The doctor's request to each node and a node's answer, as values that travel as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """Part of a request or an answer; unknown fields are ignored, since a node may have another Packhorse version."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class DoctorRequest(Message):
    """What every node checks."""

    num_nodes: int
    gpus_per_node: int
    """GPUs per node; 0: the run computes on CPUs."""
    folder: str
    """Absolute folder that every node must see: the run folder, or the parent of run folders."""
    token: str
    """Random part of the names of the files of this request."""
    plan_sha256: str = ""
    """Hash of the run's plan.json where the request is made; empty without a run."""
    needed_bytes: int = 0
    """Disk space that the run's checkpoints still need."""
    weights_bytes: int = 0
    """Size of the base model; 0 if unknown."""
    model_folder: str = ""
    """Folder of the base model; may contain `${env:NAME}`, which each node expands itself."""
    model_id: str = ""
    """Hub name of the base model, which is looked up in the cache."""
    model_revision: str | None = None
    data_folder: str = ""
    scratch: str = ""
    """Local folder of each node, from the site profile; empty for TMPDIR of the node, or /tmp."""
    wandb: str = "off"
    """track.wandb of the recipe."""
    fast: bool = False
    """Skip checks of more than a few seconds: bandwidth, renames during reads, W&B."""
    master_addr: str = ""
    """Host name of the first node; empty: taken from the allocation."""
    master_port: int = 0
    """Port of the rendezvous; 0: computed from the job's number."""


class Gpu(Message):
    """One GPU as reported by nvidia-smi."""

    index: str
    name: str
    memory_mib: int
    used_mib: int


class GpuFacts(Message):
    """GPUs of a node, its driver, and the build of torch."""

    gpus: tuple[Gpu, ...] = ()
    """GPUs that CUDA_VISIBLE_DEVICES leaves visible."""
    installed: int = 0
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    error: str = ""
    driver_cuda: str = ""
    """Newest CUDA version that the driver can run; empty without a driver."""
    torch_cuda: str = ""
    """CUDA version that torch was built with; empty in a CPU build."""
    torch_rocm: str = ""


class InterfaceChoice(Message):
    """Network interface that a library will use."""

    library: str
    interface: str
    address: str
    error: str = ""
    """Why the library finds no interface."""


class FailedConnection(Message):
    """A failed connection to another node."""

    node_id: int
    library: str
    address: str
    error: str


class NetworkFacts(Message):
    """Names, interfaces and connections of a node."""

    choices: tuple[InterfaceChoice, ...] = ()
    interfaces: dict[str, str] = {}
    """IPv4 address by name, of the interfaces that are up."""
    master_addr: str = ""
    master_port: int = 0
    resolved: str = ""
    """Address of the first node's name, as this node resolves it."""
    resolve_error: str = ""
    rendezvous_error: str = ""
    """Why the first node could not open its port, or why this node could not reach it."""
    met_nodes: tuple[int, ...] = ()
    """Nodes that joined the rendezvous, including this one."""
    num_connections: int = 0
    """Connections tried to other nodes: one per address that a library there will use."""
    failed_connections: tuple[FailedConnection, ...] = ()
    clock_skew_seconds: float | None = None
    """Difference of this node's clock from the first node's."""
    link_mbit: int | None = None
    """Rate of the chosen interface, or of all InfiniBand ports together."""


class FolderFacts(Message):
    """View of a node on the shared folder."""

    exists: bool = False
    kind: str = ""
    """Type of the file system."""
    plan_sha256: str = ""
    sees_request_file: bool = False
    """Whether the node sees the file that was written before the nodes started."""
    sees_nodes: tuple[int, ...] = ()
    """Nodes whose file this node has read."""
    write_error: str = ""
    lock_error: str = ""
    free_bytes: int = 0
    write_bytes_per_second: float | None = None
    rename_reads: int = 0
    rename_faults: int = 0
    rename_fault: str = ""


class ResourceFacts(Message):
    """Memory and local disk of a node."""

    scratch: str = ""
    scratch_error: str = ""
    scratch_free_bytes: int = 0
    scratch_kind: str = ""
    shm_bytes: int = 0
    memory_bytes: int = 0
    """Memory that a process may use: the least of machine, cgroup and Slurm job."""
    memory_from: str = ""
    locked_bytes: int = -1
    """Memory that may be locked (RLIMIT_MEMLOCK); -1: unlimited."""
    infiniband: bool = False


class InputFacts(Message):
    """Whether the node finds the weights, the data and W&B."""

    model_fault: str = ""
    may_fetch: bool = False
    """HF_HUB_OFFLINE is off: a missing model is downloaded when it is loaded."""
    model_found: str = ""
    data_fault: str = ""
    wandb_error: str = ""
    wandb_host: str = ""
    """Host of W&B; empty if it was not tried."""


class BandwidthFacts(Message):
    """All-reduce over all nodes, as measured by rank 0."""

    world_size: int = 0
    backend: str = ""
    small_bytes: int = 0
    small_seconds: float = 0.0
    large_bytes: int = 0
    bus_bytes_per_second: float = 0.0
    error: str = ""
    timed_out: bool = False
    """Whether the ranks of this node were ended because they had not finished in time."""


class NodeFacts(Message):
    """Answer of one node."""

    node_id: int
    host: str
    versions: dict[str, str]
    gpu: GpuFacts = GpuFacts()
    network: NetworkFacts = NetworkFacts()
    folder: FolderFacts = FolderFacts()
    resources: ResourceFacts = ResourceFacts()
    inputs: InputFacts = InputFacts()
    bandwidth: BandwidthFacts | None = None
    seconds: float = 0.0
    """Duration of the checks."""
