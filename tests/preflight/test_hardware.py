"""Measured rates as a kind of hardware: what stands for what, from a report that is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakor.plan.hardware import find_hardware
from megakor.preflight.compare import Nodes
from megakor.preflight.hardware import Probe, write_hardware
from megakor.preflight.report import Report
from tests.preflight.people import people
from tests.preflight.test_judge import measured

PROBE = Probe(300.0, 290.0, 20.0, 1500.0, 25.0, 10.0, 0.5)


def report(num_nodes: int) -> Report:
    made = Report(2 * num_nodes)
    everyone = people(num_nodes)
    made.add_people(everyone, Nodes.of(everyone))
    made.add_rates(measured(num_nodes))
    return made


def test_the_file_is_what_a_plan_reads(tmp_path: Path) -> None:
    write_hardware(tmp_path / "ours.yaml", report(3), [PROBE] * 6, watts=700.0)
    found = find_hardware(str(tmp_path / "ours.yaml"))
    assert (found.name, found.measured, found.per_node, found.watts) == ("ours", True, 2, 700.0)
    assert (found.bf16_tflops, found.fp32_tflops, found.attention_efficiency) == (300.0, 20.0, 0.5)
    assert found.node_gb_per_s == 200.0
    assert 20.0 <= found.network_gb_per_s <= 20.4
    assert (found.node_latency_us, found.network_latency_us) == (5.0, 15.0)  # two steps each


def test_of_one_node_its_links_stand_for_the_networks(tmp_path: Path) -> None:
    write_hardware(tmp_path / "ours.yaml", report(1), [PROBE] * 2, watts=700.0)
    found = find_hardware(str(tmp_path / "ours.yaml"))
    assert found.network_gb_per_s == found.node_gb_per_s == 200.0


def test_one_rank_has_no_links(tmp_path: Path) -> None:
    alone = report(1)
    alone.nodes[0].node_gb_per_s = None
    with pytest.raises(ValueError, match="out= must be asked of at least two ranks"):
        write_hardware(tmp_path / "ours.yaml", alone, [PROBE], watts=700.0)
    assert not (tmp_path / "ours.yaml").exists()
