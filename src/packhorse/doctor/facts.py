"""What the doctor asks each node, and what a node says of itself: values that travel as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A part of a question or an answer; a node with another version of Packhorse may say more, or less."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class Question(Part):
    """What every node is asked."""

    num_nodes: int
    gpus_per_node: int
    """0: the run computes on CPUs."""
    folder: str
    """Absolute folder that every node must see: the run's, or the one that runs lie in."""
    token: str
    """Names the files of this examination."""
    plan_sha256: str = ""
    """Of the run's plan.json as whoever asks sees it; empty where no run is named."""
    needed_bytes: int = 0
    """That the checkpoints of the run still need."""
    weights_bytes: int = 0
    """Of the model that the run starts from; 0 where it is not known."""
    model_folder: str = ""
    """May hold `${env:NAME}`, which each node reads for itself."""
    model_id: str = ""
    """Hub name, looked for in the cache."""
    model_revision: str | None = None
    data_folder: str = ""
    scratch: str = ""
    """Folder for what only one node needs, as the site profile names it; empty: TMPDIR of the node, or /tmp."""
    wandb: str = "off"
    """track.wandb of the recipe."""
    fast: bool = False
    """Without what takes more than a few seconds: bandwidth, renames under a reader, W&B."""
    master_addr: str = ""
    """Empty: the first node of the allocation."""
    master_port: int = 0


class Gpu(Part):
    """One GPU as nvidia-smi shows it."""

    index: str
    name: str
    memory_mib: int
    used_mib: int


class GpuFacts(Part):
    """GPUs of a node, its driver, and what torch was built for."""

    gpus: tuple[Gpu, ...] = ()
    """Those that CUDA_VISIBLE_DEVICES leaves."""
    installed: int = 0
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    error: str = ""
    driver_cuda: str = ""
    """Newest CUDA that the driver can run; empty without a driver."""
    torch_cuda: str = ""
    """CUDA that torch was built with; empty in a build for CPUs."""
    torch_rocm: str = ""


class Choice(Part):
    """The network interface that a library will take."""

    library: str
    interface: str
    address: str
    error: str = ""
    """Why it has none."""


class Failed(Part):
    """A connection to another node that could not be made."""

    node_id: int
    library: str
    address: str
    error: str


class NetworkFacts(Part):
    """How a node is called, and whom it reaches."""

    choices: tuple[Choice, ...] = ()
    interfaces: dict[str, str] = {}
    """Name to IPv4 address, of those that are up."""
    master_addr: str = ""
    master_port: int = 0
    resolved: str = ""
    """Address of the first node's name here."""
    resolve_error: str = ""
    hub_error: str = ""
    """Why the first node's port could not be opened there, or reached from here."""
    met: tuple[int, ...] = ()
    """Nodes that came to the first one, itself too."""
    ways: int = 0
    """To other nodes that were tried: each address that a library of theirs will take."""
    failed: tuple[Failed, ...] = ()
    clock_skew_seconds: float | None = None
    """Of this clock against the first node's."""
    link_mbit: int | None = None
    """Of the chosen interface, or of all InfiniBand ports together."""


class FolderFacts(Part):
    """What a node sees of the folder that is to be shared."""

    exists: bool = False
    kind: str = ""
    """File system type."""
    plan_sha256: str = ""
    sees_start: bool = False
    """The file that whoever asks wrote before."""
    sees: tuple[int, ...] = ()
    """Nodes whose file it read."""
    write_error: str = ""
    lock_error: str = ""
    free_bytes: int = 0
    write_bytes_per_second: float | None = None
    rename_reads: int = 0
    rename_faults: int = 0
    rename_fault: str = ""


class RoomFacts(Part):
    """Memory and local disk of a node."""

    scratch: str = ""
    scratch_error: str = ""
    scratch_free_bytes: int = 0
    scratch_kind: str = ""
    shm_bytes: int = 0
    memory_bytes: int = 0
    """Of the machine, or of the cgroup where that is less."""
    memory_from: str = ""
    locked_bytes: int = -1
    """That may be locked (RLIMIT_MEMLOCK); -1: as much as there is."""
    infiniband: bool = False


class StoreFacts(Part):
    """Whether what the run reads is there."""

    model_fault: str = ""
    may_fetch: bool = False
    """HF_HUB_OFFLINE is off: what is not there is fetched when it is loaded."""
    model_found: str = ""
    data_fault: str = ""
    wandb_error: str = ""
    wandb_host: str = ""
    """Empty where it was not tried."""


class BandwidthFacts(Part):
    """All-reduce over all nodes, as rank 0 measured it."""

    world_size: int = 0
    backend: str = ""
    small_bytes: int = 0
    small_seconds: float = 0.0
    large_bytes: int = 0
    bus_bytes_per_second: float = 0.0
    error: str = ""


class NodeFacts(Part):
    """What one node says."""

    node_id: int
    host: str
    versions: dict[str, str]
    gpu: GpuFacts = GpuFacts()
    network: NetworkFacts = NetworkFacts()
    folder: FolderFacts = FolderFacts()
    room: RoomFacts = RoomFacts()
    store: StoreFacts = StoreFacts()
    bandwidth: BandwidthFacts | None = None
    seconds: float = 0.0
    """That it took."""
