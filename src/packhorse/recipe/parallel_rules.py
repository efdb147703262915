"""Rules between the fields of `parallel`; what depends on the number of processes is the plan's."""

from __future__ import annotations

from collections.abc import Iterator

from packhorse.recipe.findings import Finding
from packhorse.recipe.schema import ParallelSection


def parallel_rules(parallel: ParallelSection) -> Iterator[Finding]:
    """Fields that the engine does not read, or lacks."""
    if parallel.engine != "hsdp" and parallel.shard_group is not None:
        yield Finding(
            (("parallel", "shard_group"), ("parallel", "engine")),
            f"parallel.shard_group is {parallel.shard_group}, and parallel.engine is {parallel.engine}.",
            "only hsdp holds several copies of the weights, one for each group of processes.",
            "remove parallel.shard_group, or set parallel.engine to hsdp",
        )
    if parallel.engine == "zero3_nvme" and parallel.nvme is None:
        yield Finding(
            (("parallel", "engine"), ("parallel", "nvme")),
            "parallel.engine is zero3_nvme, and parallel.nvme is not given.",
            "weights and optimizer states are kept in a folder on a disk of each node.",
            "set parallel.nvme to a folder on a fast local disk, e.g. /local/scratch; zero3_offload needs none",
        )
    if parallel.engine != "zero3_nvme" and parallel.nvme is not None:
        yield Finding(
            (("parallel", "nvme"), ("parallel", "engine")),
            f"parallel.nvme is {parallel.nvme}, and parallel.engine is {parallel.engine}.",
            "only zero3_nvme keeps anything there.",
            "remove parallel.nvme, or set parallel.engine to zero3_nvme",
        )
