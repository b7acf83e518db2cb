"""A preflight over real gloo ranks: a healthy one, and one for each fault that can be had here."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from megakor.config.schema import PretrainConfig
from tests.distributed.runs import Made, configuration
from tests.preflight.ranks import Came, Seat, fly, outside_interface, two_nodes
from tests.ranks import free_port


def same_faults(came: list[Came | None]) -> list[str]:
    """The faults, which all ranks that came must have heard."""
    ended = [one for one in came if one is not None]
    assert all(one.error is None for one in ended), [one.error for one in ended]
    assert all(one.faults == ended[0].faults for one in ended)
    return ended[0].faults


def test_two_healthy_nodes(made: Made, tmp_path: Path) -> None:
    config = configuration(made, tmp_path / "run", train__batch_sizes={8: 4})
    name, address = outside_interface()
    start = time.monotonic()
    seats = [Seat(config, host, environment={"GLOO_SOCKET_IFNAME": name}) for host in ("a", "a", "b", "b")]
    came = fly(seats)
    assert time.monotonic() - start < 60
    assert same_faults(came) == []
    assert came[0] is not None
    report = came[0].report
    assert [(node.label, node.ranks, node.address) for node in report.nodes] == [
        ("a", [0, 1], address), ("b", [2, 3], address),
    ]  # fmt: skip
    assert [link.ranks for link in report.links] == [(0, 2), (1, 3)]
    assert all(link.gb_per_s > 0 and link.latency_us > 0 for link in report.links)
    assert all(len(node.matmul_tflops) == 2 and min(node.matmul_tflops) > 0 for node in report.nodes)
    assert all(node.node_gb_per_s > 0 and node.device_free > 0 for node in report.nodes)
    assert abs(report.nodes[1].clock_seconds) <= report.nodes[1].clock_uncertainty  # both ask one clock
    assert report.inputs.keys() == {"data.train", "data.validation.held", "data.tokenizer"}
    assert report.checkpoint_bytes < report.disk_free
    assert not (tmp_path / "run").exists()  # nothing stays


def test_one_rank_alone(made: Made, tmp_path: Path) -> None:
    (one,) = fly([Seat(configuration(made, tmp_path / "run"))])
    assert one is not None
    assert (one.error, one.faults) == (None, [])
    assert one.report.nodes[0].matmul_tflops[0] > 0


def test_a_missing_rank_is_named_in_seconds(made: Made, tmp_path: Path) -> None:
    config = configuration(made, tmp_path / "run")
    start = time.monotonic()
    faults = same_faults(fly([Seat(config), None, Seat(config)], seconds=3))
    assert time.monotonic() - start < 20
    here = socket.gethostname()
    assert faults[0] == f"rank 1 on node {here}: must come to rank 0 within 3 s; 2 of 3 ranks have come"


def test_without_rank_0_the_others_say_where_they_looked(made: Made, tmp_path: Path) -> None:
    port = free_port()
    _, came = fly([None, Seat(configuration(made, tmp_path / "run"))], seconds=1, port=port)
    assert came is not None
    assert came.error is not None
    rule = f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port} (cluster.master_address, cluster.master_port) must answer within"
    assert rule in came.error


def test_a_port_in_use(made: Made, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        first, *_ = fly([Seat(configuration(made, tmp_path / "run")), None], seconds=1, port=port)
    assert first is not None
    assert first.error is not None
    assert first.error.startswith(f"MASTER_PORT={port} (cluster.master_port) must be free on the first node")


def test_an_address_of_rank_0_that_other_nodes_do_not_reach(made: Made, tmp_path: Path) -> None:
    _, came = fly([None, *two_nodes(configuration(made, tmp_path / "run"))[1:]], master="127.0.0.1")
    assert came is not None
    assert came.error is not None
    assert "MASTER_ADDR=127.0.0.1 (cluster.master_address) must be an address of rank 0's node" in came.error


def test_the_loopback_trap(made: Made, tmp_path: Path) -> None:
    """gloo would take 127.0.0.1 where the host's name means it, as `localhost` does, and wait for minutes."""
    name, address = outside_interface()
    seats = two_nodes(configuration(made, tmp_path / "run"))
    seats[1] = Seat(seats[1].config, "localhost")
    start = time.monotonic()
    faults = same_faults(fly(seats))
    assert time.monotonic() - start < 20
    assert len(faults) == 1
    assert faults[0].startswith("node localhost: gloo would take address 127.0.0.1, which no other node reaches")
    assert f"cluster.interface (GLOO_SOCKET_IFNAME) must name one of {name} ({address})" in faults[0]


def test_an_interface_that_is_not_there(made: Made, tmp_path: Path) -> None:
    seats = two_nodes(configuration(made, tmp_path / "run"))
    seats[1].environment = {"GLOO_SOCKET_IFNAME": "ib7"}
    (fault,) = same_faults(fly(seats))
    assert fault.startswith("node b: GLOO_SOCKET_IFNAME=ib7 (cluster.interface) must be an interface that is up: ")


def other_version(folder: str) -> None:
    sys.path.insert(0, folder)


def test_another_version_of_a_package_on_one_rank(made: Made, tmp_path: Path) -> None:
    info = tmp_path / "site" / "safetensors-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 9.9\n")
    config = configuration(made, tmp_path / "run")
    seats = [Seat(config), Seat(config), Seat(config)]
    seats[0].before = functools.partial(other_version, str(info.parent))
    (fault,) = same_faults(fly(seats))
    assert fault.startswith(f"node {socket.gethostname()}, rank 0: safetensors=9.9 must be ")  # the few, not the first
    assert fault.endswith(", as on the other ranks")


def test_another_configuration_on_one_rank(made: Made, tmp_path: Path) -> None:
    config = configuration(made, tmp_path / "run")
    different = copy.deepcopy(config)
    different.optimizer.lr, different.train.batch_sizes = 1e-4, {8: 4}
    (fault,) = same_faults(fly([Seat(config), Seat(different)]))
    assert "rank 1: optimizer.lr=0.0001 must be 0.003" in fault
    assert "train.batch_sizes.8=4 must be absent" in fault


def test_two_ranks_of_one_local_rank(made: Made, tmp_path: Path) -> None:
    """What a host that is listed twice leads to."""
    config = configuration(made, tmp_path / "run")
    twice = Seat(config, environment={"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    faults = same_faults(fly([copy.deepcopy(twice), twice], master=outside_interface()[1]))
    here = socket.gethostname()
    assert f"node {here}, ranks 0, 1: LOCAL_RANK=0 must be one rank's alone" in faults
    assert f"node {here}: LOCAL_WORLD_SIZE=1 must be the number of its ranks, 2" in faults


def nodes_apart(config: PretrainConfig, folder: Path) -> list[Seat]:
    """Two nodes whose relative paths lead to folders of their own."""
    seats = two_nodes(config)
    for seat in seats:
        (folder / str(seat.host)).mkdir()
        seat.folder = str(folder / str(seat.host))
    return seats


def test_shards_that_differ_between_nodes_or_are_not_there(made: Made, other: Made, tmp_path: Path) -> None:
    config = configuration(made, tmp_path / "run", data__train="shards")
    seats = nodes_apart(config, tmp_path)
    shutil.copytree(made.train, tmp_path / "a" / "shards")
    (fault,) = same_faults(fly(seats))
    assert fault.startswith("node b: data.train: shards/manifest.json: not there")
    shutil.copytree(other.train, tmp_path / "b" / "shards")
    (fault,) = same_faults(fly(seats))
    assert fault.startswith("node b: data.train=")
    assert fault.endswith(", as on the other ranks")


def test_a_shard_that_was_cut(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.train, tmp_path / "shards")
    shard = next((tmp_path / "shards").glob("*.bin"))
    with shard.open("r+b") as file:
        file.truncate(10)
    config = configuration(made, tmp_path / "run", data__train=str(tmp_path / "shards"))
    (fault,) = same_faults(fly([Seat(config)]))
    assert f"data.train: {shard}: size=10, must be " in fault


def test_a_run_folder_that_is_not_shared(made: Made, tmp_path: Path) -> None:
    config = configuration(made, Path("run"))
    seats = nodes_apart(config, tmp_path)
    (fault,) = same_faults(fly(seats))
    assert fault.startswith("node b: run=run must be a folder that all nodes share: a file of rank 0's is not seen")
    assert not (tmp_path / "a" / "run").exists()
    assert not (tmp_path / "b" / "run").exists()


def test_a_run_folder_that_cannot_be_written(made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = configuration(made, tmp_path / "file" / "run")
    faults = same_faults(fly([Seat(config), Seat(config)]))
    assert faults == [f"node {socket.gethostname()}: run={tmp_path}/file/run must be writable: [Errno 20] "
                      f"Not a directory: '{tmp_path}/file/run'"]  # fmt: skip


def small_disk() -> None:
    from megakor.preflight import flight

    flight.free_disk = lambda folder: 1000


def test_too_little_disk_for_a_checkpoint(made: Made, tmp_path: Path) -> None:
    """The free space is made up; the size of the checkpoint is not."""
    seat = Seat(configuration(made, tmp_path / "run"), before=small_disk)
    (fault,) = same_faults(fly([seat]))
    assert fault.startswith(f"run={tmp_path}/run must have ")


def late(seconds: float) -> None:
    from megakor.preflight import flight

    flight.compare_clocks = functools.partial(flight.compare_clocks, now=lambda: time.time() + seconds)


def test_a_clock_that_is_off(made: Made, tmp_path: Path) -> None:
    """The clock is a function that is passed in."""
    seats = two_nodes(configuration(made, tmp_path / "run"))
    seats[1].before = functools.partial(late, -30)
    (fault,) = same_faults(fly(seats))
    assert fault.startswith("node b: its clock, -30.0")
    assert fault.endswith("from rank 0's, must be within 1 s")


def slow_matmul() -> None:
    from megakor.preflight import flight, rates

    flight.measure = functools.partial(
        flight.measure, matmul=lambda precision, seconds: rates.matmul_tflops(precision, seconds) / 1000
    )


def test_a_slow_device_is_named(made: Made, tmp_path: Path) -> None:
    """Its measured rate is divided: how fast a process is on a shared machine is nothing to test by."""
    config = configuration(made, tmp_path / "run")
    (fault,) = same_faults(fly([Seat(config), Seat(config, before=slow_matmul), Seat(config)]))
    assert fault.startswith(f"node {socket.gethostname()}, rank 1: matmul at ")
    assert "TFLOP/s must be at least 2% of the other ranks' median, " in fault


def dead_node() -> None:
    """Listens, as its identity says, at a port that nobody answers at."""
    from megakor.preflight import identity

    class Deaf(identity.Listener):
        def __init__(self, address: str) -> None:
            super().__init__(address)
            self.close()

    identity.Listener = Deaf


def test_a_node_that_cannot_be_reached(made: Made, tmp_path: Path) -> None:
    """A refused connection stands for a firewall's."""
    seats = two_nodes(configuration(made, tmp_path / "run"))
    seats[1].before = dead_node
    (fault,) = same_faults(fly(seats))
    assert fault.startswith("node b: node a must reach it, and cannot: ")


@pytest.mark.skipif(not os.path.exists("/proc/self/ns/net"), reason="no namespaces")
def test_nodes_are_told_apart() -> None:
    from megakor.preflight.identity import machine

    assert machine().startswith(f"{socket.gethostname()} ")
