"""The rules of what a plan needs to know besides the run."""

from __future__ import annotations

import re

from megakor.config.cluster_schema import ClusterConfig
from megakor.config.rules import positive, require


def count_and_kind(gpus: str) -> tuple[int, str]:
    """The number and the kind of accelerators: `256xa100-80g` -> 256 of a100-80g.

    ValueError where it is not of that form.
    """
    found = re.fullmatch(r"([1-9][0-9]*)x(.+)", gpus)
    require(found is not None, "cluster.gpus", gpus, "be number x kind, such as 256xa100-80g")
    assert found is not None
    return int(found[1]), found[2]


def check_accelerators(cluster: ClusterConfig) -> None:
    """The rules of how many accelerators there are, and of what they cost."""
    if cluster.gpus is not None:
        count_and_kind(cluster.gpus)
    positive("cluster.ranks_per_node", cluster.ranks_per_node)
    positive("cluster.price_krw", cluster.price_krw)
    positive("cluster.krw_per_usd", cluster.krw_per_usd)
