"""The addresses that gloo and NCCL take: gloo is asked itself, NCCL is not here and its documented rules are tried."""

from __future__ import annotations

import os
import socket

import psutil
import pytest
import torch.distributed as dist

from megakor.preflight.addresses import Interfaces, Listener, gloo_address, nccl_address, unreachable

MADE_UP = Interfaces(
    {
        "lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": ["10.0.0.1"], "eth1": ["10.0.1.1"],
        "ib0": ["10.1.0.1"],
    }
)  # fmt: skip


def listening() -> set[str]:
    connections = psutil.Process(os.getpid()).net_connections()
    return {f"{entry.laddr.ip}:{entry.laddr.port}" for entry in connections if entry.status == psutil.CONN_LISTEN}


def test_gloo_listens_where_we_say_by_its_host_name() -> None:
    before = listening()
    device = dist.ProcessGroupGloo.create_default_device()
    (place,) = listening() - before
    assert place.rpartition(":")[0] == gloo_address(Interfaces.of_this_machine(), {})
    del device


@pytest.mark.parametrize("name", list(Interfaces.of_this_machine().addresses))
def test_gloo_listens_where_we_say_by_an_interface(name: str) -> None:
    before = listening()
    device = dist.ProcessGroupGloo.create_device(interface=name)
    (place,) = listening() - before
    assert place.rpartition(":")[0] == gloo_address(Interfaces.of_this_machine(), {"GLOO_SOCKET_IFNAME": name})
    del device


def test_a_host_name_without_an_address_means_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert gloo_address(Interfaces.of_this_machine(), {}) == "127.0.0.1"


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("", "10.1.0.1"),  # InfiniBand first
        ("eth", "10.0.0.1"),
        ("=eth1", "10.0.1.1"),
        ("eth1,ib", "10.1.0.1"),
        ("^ib,docker,lo", "10.0.0.1"),
        ("^=ib0", "10.0.0.1"),
        ("docker", "172.17.0.1"),
    ],
)
def test_nccls_interfaces(given: str, address: str) -> None:
    assert nccl_address(MADE_UP, {"NCCL_SOCKET_IFNAME": given} if given else {}) == address


def test_nccl_takes_dockers_interface_and_loopback_last() -> None:
    names = MADE_UP.addresses
    assert nccl_address(Interfaces({name: names[name] for name in ("lo", "docker0")}), {}) == "172.17.0.1"
    assert nccl_address(Interfaces({"lo": names["lo"]}), {}) == "127.0.0.1"


def test_an_interface_that_nothing_fits() -> None:
    with pytest.raises(ValueError, match=r"NCCL_SOCKET_IFNAME=ib7 \(cluster.interface\) must fit an interface"):
        nccl_address(MADE_UP, {"NCCL_SOCKET_IFNAME": "ib7"})
    with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME=ib7 \(cluster.interface\) must be an interface"):
        gloo_address(MADE_UP, {"GLOO_SOCKET_IFNAME": "ib7"})


def test_interfaces_that_others_may_reach() -> None:
    assert MADE_UP.usable() == ["docker0 (172.17.0.1)", "eth0 (10.0.0.1)", "eth1 (10.0.1.1)", "ib0 (10.1.0.1)"]
    assert MADE_UP.of("10.0.1.1") == "eth1"
    assert MADE_UP.of("10.9.9.9") == ""


def test_who_does_not_take_a_connection_is_named() -> None:
    listener, closed = Listener("127.0.0.1"), Listener("127.0.0.1")
    closed.close()
    found = unreachable({"there": ("127.0.0.1", listener.port), "gone": ("127.0.0.1", closed.port)}, 1.0)
    listener.close()
    assert found.keys() == {"gone"}
    assert "refused" in found["gone"]
