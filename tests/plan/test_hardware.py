"""Hardware: the known kinds are whole, a file serves as one, mistakes are named; collectives take what rings take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megakor.plan.hardware import MEASURED, REACHED, Ring, find_hardware, hardware_folder, known_hardware

KINDS = {"a100-40g", "a100-80g", "h100", "h200", "a6000", "rtx-3090", "rtx-4090"}


def shipped(kind: str) -> str:
    return (hardware_folder() / f"{kind}.yaml").read_text(encoding="utf-8")


def test_the_kinds_that_are_asked_for_are_known() -> None:
    assert set(known_hardware()) >= KINDS


@pytest.mark.parametrize("kind", known_hardware())
def test_every_figure_of_a_known_kind_has_a_source(kind: str) -> None:
    hardware = find_hardware(kind)
    assert hardware.name == kind
    first, second, *_ = shipped(kind).splitlines()
    assert first.startswith("# ")
    assert second.startswith("# Figures without a remark: ")


def test_a_file_with_the_same_keys_is_a_kind(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(shipped("a100-80g"))
    assert find_hardware(str(path)) == replace(find_hardware("a100-80g"), name="mine")


def test_rates_that_were_measured_are_reached(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(shipped("a100-80g").replace("measured: false", "measured: true"))
    assert {name: getattr(find_hardware(str(path)), name) for name in MEASURED} == MEASURED
    assert {name: getattr(find_hardware("a100-80g"), name) for name in REACHED} == REACHED


def test_an_unknown_kind_is_told_how_to_be_added() -> None:
    with pytest.raises(
        ValueError, match=r"hardware v100 must be one of .*a100-80g.*, or a YAML file with the keys of .*"
    ):
        find_hardware("v100")
    with pytest.raises(ValueError, match=r"hardware /nowhere/x.yaml must be a file that is there"):
        find_hardware("/nowhere/x.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("watts: 812", "watts: 0", "watts=0 must be a number above 0"),
        ("watts: 812", "watts: many", "watts=many must be a number above 0"),
        ("per_node: 8", "per_node: 7.5", "per_node=7.5 must be a whole number above 0"),
        ("measured: false", "measured: 1", "measured=1 must be true or false"),
        ("measured: false", "", "measured must be given"),
        ("watts: 812", "volts: 12\nwatts: 812", "volts must be one of measured, memory_gib,"),
    ],
)
def test_a_wrong_figure_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    assert old in shipped("a100-80g")
    path.write_text(shipped("a100-80g").replace(old, new))
    with pytest.raises(ValueError, match=message):
        find_hardware(str(path))


def test_a_file_of_no_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold keys and figures"):
        find_hardware(str(path))


def test_a_collective_takes_what_a_ring_moves() -> None:
    hardware = replace(
        find_hardware("a100-80g"), node_gb_per_s=100.0, network_gb_per_s=10.0, node_latency_us=1.0,
        network_latency_us=2.0, link_efficiency=0.5,
    )  # fmt: skip
    inside, across = Ring.of(8, 1, 8), Ring.of(16, 4, 8)
    assert (inside.in_node, across.in_node) == (8, 2)
    # 7/8 of 1 GB at 50 GB/s and 7 hops; an all-reduce moves it twice, up and down a tree of 3 levels.
    assert inside.seconds("all_gather", 1e9, hardware) == pytest.approx(7 / 8 / 50 + 7e-6)
    assert inside.seconds("all_reduce", 1e9, hardware) == pytest.approx(2 * 7 / 8 / 50 + 6e-6)
    # Two ranks of the group share a node, and so its links: 2 × 10 GB/s, half of it reached.
    assert across.seconds("reduce_scatter", 1e9, hardware) == pytest.approx(15 / 16 / 10 + 15 * 2e-6)
    twice = replace(hardware, gather_passes=2.0)
    assert inside.seconds("all_gather", 1e9, twice) == pytest.approx(2 * 7 / 8 / 50 + 7e-6)
    assert inside.seconds("all_reduce", 1e9, twice) == inside.seconds("all_reduce", 1e9, hardware)
    assert Ring(2, 1).seconds("send", 1e9, hardware) == pytest.approx(1 / 5 + 2e-6)
    assert Ring(1, 1).seconds("all_reduce", 1e9, hardware) == 0.0


def test_ranks_that_are_a_node_apart_share_none() -> None:
    assert Ring.of(4, 8, 8).in_node == 1
    assert Ring.of(4, 16, 8).in_node == 1
