"""The largest layout that what is left of a cluster can hold."""

from __future__ import annotations

from megakor.config.schema import ParallelConfig


def largest_world_size(parallel: ParallelConfig, num_slots: int) -> int:
    """The most ranks, of so many slots, that a layout takes: any number of replicas, each whole.

    A data-parallel size that is set is an upper limit: batches are dealt to any smaller number of replicas, too.

    Raises:
        ValueError: there are too few slots for one replica.
    """
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
    replica = 1
    for name in sizes:
        replica *= getattr(parallel, name)
    if num_slots < replica:
        product = " × ".join(f"parallel.{name}={getattr(parallel, name)}" for name in sizes)
        raise ValueError(f"{num_slots} slots must hold at least one replica: {product} = {replica} ranks")
    replicas = num_slots // replica
    if parallel.data_parallel_size is not None:
        replicas = min(replicas, parallel.data_parallel_size)
    return replica * replicas
