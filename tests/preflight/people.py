"""Identities of ranks that do not exist, for rules that need machines which are not here."""

from __future__ import annotations

from typing import Any

from megakor.preflight.compare import GIB
from megakor.preflight.identity import Identity

NODE_SIZE = 2


def person(rank: int, **changes: Any) -> Identity:
    """A rank of nodes with two accelerators each, `node0` and so on."""
    node, local_rank = divmod(rank, NODE_SIZE)
    fields: dict[str, Any] = {
        "rank": rank, "local_rank": local_rank, "local_size": NODE_SIZE, "host": f"node{node}",
        "machine": f"node{node} boot net", "address": f"10.0.0.{node + 1}", "interface": "ib0",
        "library_address": f"10.0.0.{node + 1}", "port": 4000, "num_devices": NODE_SIZE, "device": "accelerator",
        "device_free": 79 * GIB, "device_total": 80 * GIB, "host_free": 900 * GIB, "shared_free": 64 * GIB,
        "master": "10.0.0.1", "usable": ["ib0 (10.0.0.1)"], "versions": {"torch": "2.13.0"}, "packages": {},
        "config": {"train.seed": 1},
    }  # fmt: skip
    return Identity(**{**fields, **changes})


def people(num_nodes: int, **of_rank: dict[str, Any]) -> dict[int, Identity]:
    """Nodes full of ranks; `r3={…}` changes rank 3."""
    return {rank: person(rank, **of_rank.get(f"r{rank}", {})) for rank in range(num_nodes * NODE_SIZE)}
