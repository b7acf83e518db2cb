"""Host files and selections: as the `deepspeed` launcher reads them, with errors that name what is wrong."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from deepspeed.launcher import runner
from hypothesis import given
from hypothesis import strategies as st

from megakor.launch.hosts import (
    check_port,
    first_slots,
    host_file,
    include_of,
    is_here,
    left_over,
    read_hosts,
    select,
    trim,
    unreachable,
)
from tests.launch.sshd import MISSING, hosts_over_ssh

TWO = {"node-1": [0, 1, 2, 3], "node-2": [0, 1]}


def test_the_example_is_read_as_deepspeed_reads_it() -> None:
    path = Path(__file__).resolve().parents[2] / "launch" / "hostfile.example"
    theirs = runner.parse_inclusion_exclusion(runner.fetch_hostfile(str(path)), "", "")
    assert read_hosts(path) == dict(theirs)


def test_comments_and_spaces(tmp_path: Path) -> None:
    path = tmp_path / "호스트"
    path.write_text("# 첫째\n\n  node-1   slots=4 # 뒤\nnode-2 slots=2\n")
    assert read_hosts(path) == TWO
    assert read_hosts(path) == dict(runner.parse_inclusion_exclusion(runner.fetch_hostfile(str(path)), "", ""))


@pytest.mark.parametrize(("text", "message"), [
    ("a slots=2\nb slots=1\na slots=2\n", r"host a must be there once, and is on lines 1 and 3$"),
    ("a slots=2\nb\n", r"line 2, 'b', must be HOST slots=NUMBER, above 0$"),
    ("a slots=two\n", r"line 1, 'a slots=two', must be HOST slots=NUMBER"),
    ("a slots=0\n", r"line 1, 'a slots=0', must be HOST slots=NUMBER, above 0$"),
    ("# none\n", r"must have a line `HOST slots=NUMBER` for each host, and has none$"),
])  # fmt: skip
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^cluster\.hostfile={path}:? {message}"):
        read_hosts(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cluster\.hostfile=.*/none must be a file with a line"):
        read_hosts(tmp_path / "none")


specs = st.lists(
    st.one_of(
        st.sampled_from(["node-1", "node-2"]),
        st.sampled_from(["node-1:0", "node-1:3,1", "node-2:1", "node-2:0,1"]),
    ),
    min_size=1, max_size=2, unique_by=lambda spec: spec.split(":")[0],
).map("@".join)  # fmt: skip


@given(specs, st.booleans())
def test_selections_are_deepspeeds(spec: str, include: bool) -> None:
    words = (spec, "") if include else ("", spec)
    theirs = dict(runner.parse_inclusion_exclusion({host: len(slots) for host, slots in TWO.items()}, *words))
    if theirs:
        assert select(TWO, *words) == theirs
    else:
        with pytest.raises(ValueError, match=r"cluster\.exclude=.* must leave a slot"):
            select(TWO, *words)


@pytest.mark.parametrize(("include", "exclude", "message"), [
    ("node-3", "", r"cluster\.include=node-3 must name hosts of the host file, not 'node-3': node-1, node-2"),
    ("", "node-1:9", r"cluster\.exclude=node-1:9 must name slots that node-1 has: \[0, 1, 2, 3\], not \[9\]"),
    ("node-1:", "", r"cluster\.include=node-1: must be of the form HOST@HOST:SLOT,SLOT"),
    ("node-1:a", "", r"cluster\.include=node-1:a must be of the form"),
])  # fmt: skip
def test_bad_selections(include: str, exclude: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(TWO, include, exclude)


def test_the_first_of_them() -> None:
    assert trim(TWO, 1, 2) == {"node-1": [0, 1]}
    assert trim(TWO, None, None) == TWO
    with pytest.raises(ValueError, match=r"cluster\.num_nodes=3 must be at most the 2 hosts that are selected"):
        trim(TWO, 3, None)
    with pytest.raises(ValueError, match=r"cluster\.ranks_per_node=3 must be at most the 2 slots of node-2"):
        trim(TWO, None, 3)
    assert first_slots(TWO, 5) == {"node-1": [0, 1, 2, 3], "node-2": [0]}
    assert left_over(TWO, first_slots(TWO, 5)) == "node-2:1"
    assert left_over(TWO, first_slots(TWO, 3)) == "node-1:3@node-2"


@given(specs)
def test_what_is_used_comes_out_of_deepspeed_again(spec: str) -> None:
    used = select(TWO, spec, "")
    pool = runner._parse_hostfile(host_file(used).splitlines())
    assert dict(runner.parse_inclusion_exclusion(pool, include_of(used), "")) == used


def test_whose_address_it_is() -> None:
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    assert is_here(socket.gethostname())
    assert not is_here("192.0.2.1")  # RFC 5737: nobody's
    assert not is_here("nobody.invalid")


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"^cluster\.master_port={port} must be free on 127\.0\.0\.1: "):
            check_port("127.0.0.1", port)
        check_port("192.0.2.1", port)  # nothing is known of another machine
    check_port("127.0.0.1", port)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_who_can_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hosts_over_ssh(tmp_path) as environment:
        monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", environment["PDSH_SSH_ARGS_APPEND"])
        gone = unreachable(["127.0.0.1", "nobody.invalid", "127.0.0.2"])
        assert list(gone) == ["nobody.invalid"]
        assert "nobody.invalid" in gone["nobody.invalid"]
        monkeypatch.setattr("sys.executable", "/nowhere/python")
        assert unreachable(["127.0.0.1"])["127.0.0.1"].startswith("it has no /nowhere/python, or no folder /")
    assert "refused" in unreachable(["127.0.0.1"])["127.0.0.1"]
