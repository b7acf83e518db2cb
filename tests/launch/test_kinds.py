"""What each kind of cluster would run: `--dry-run` writes the files, prints the commands, and nothing else."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from deepspeed.launcher.runner import parse_args
from torch.distributed.run import get_args_parser

from megakor.cli import main
from megakor.launch import hosts
from tests.config.commands import ROOT, command

DEMO = ["launch", "experiment=demo", "run=runs/실행", "--dry-run"]
TWO = ["cluster.num_nodes=2", "cluster.ranks_per_node=2", "cluster.master_address=node-1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "hosts").write_text("node-1 slots=4\nnode-2 slots=4\n")
    monkeypatch.chdir(tmp_path)
    for name in ("DS_ENV_FILE", "OMP_NUM_THREADS", "PDSH_SSH_ARGS_APPEND"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The words of every command that a dry run prints."""
    main([*DEMO, *arguments])
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*DEMO, *arguments])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


def split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The variables in front of a command, and the command."""
    words = words[1:] if words[0] == "env" else words
    while words[0] == "-u":
        words = words[2:]
    count = next(number for number, word in enumerate(words) if "=" not in word)
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def ranks_command(folder: Path, below: str = "") -> list[str]:
    return ["megakor.pretrain", "--config-dir", str(folder / "runs/실행/launch" / below), "--config-name", "config"]


def test_local(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = printed(capsys, "launch.num_ranks=2", "cluster.interface=lo")
    variables, words = split(words)
    assert variables == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    given = parse_args(words[1:])
    assert (given.num_gpus, given.module, given.no_local_rank) == (2, True, True)
    assert [given.user_script, *given.user_args] == ranks_command(folder)


def test_deepspeed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of eight slots a replica of three takes six; the file has what is used, and the rest is named."""
    options = ["cluster=deepspeed", "cluster.hostfile=hosts", "cluster.environment.NCCL_DEBUG=INFO"]
    (words,) = printed(capsys, *options, "parallel.pipeline_parallel_size=3", "cluster.interface=eth0")
    variables, words = split(words)
    given = parse_args(words[1:])
    launch = folder / "runs/실행/launch"
    assert variables["DS_ENV_FILE"] == str(launch / "environment")
    assert "ConnectTimeout" in variables["PDSH_SSH_ARGS_APPEND"]
    assert {"NCCL_DEBUG=INFO", "GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0"} <= set(
        (launch / "environment").read_text().splitlines()
    )
    assert (given.hostfile, given.include, given.launcher) == (str(launch / "hostfile"), "", "pdsh")
    assert (given.master_addr, given.master_port, given.force_multi) == ("node-1", 29500, True)
    assert (launch / "hostfile").read_text() == "node-1 slots=4\nnode-2 slots=2\n"
    assert [given.user_script, *given.user_args] == ranks_command(folder)
    assert (launch / "command").read_text() == " ".join([f"{k}={shlex.quote(v)}" for k, v in variables.items()]) + (
        f" {shlex.join(words)}\n"
    )


def test_selected_slots(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (words,) = printed(capsys, "cluster=deepspeed", "cluster.hostfile=hosts", "cluster.include=node-2@node-1:1,3")
    assert parse_args(split(words)[1][1:]).include == "node-1:1,3@node-2:0,1,2,3"
    assert (folder / "runs/실행/launch/hostfile").read_text() == "node-1 slots=4\nnode-2 slots=4\n"


def test_openmpi(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakor.launch.over_ssh.program", lambda name, rule: name)
    (words,) = printed(capsys, "cluster=openmpi", "cluster.hostfile=hosts", "cluster.exclude=node-1")
    _, words = split(words)
    assert words[0] == "mpirun"
    exported = [words[position + 1] for position, word in enumerate(words) if word == "-x"]
    assert {"MASTER_ADDR=node-2", "MASTER_PORT=29500"} <= set(exported)
    assert words[words.index("-np") + 1] == "4"
    assert words[-len(ranks_command(folder)) :] == ranks_command(folder)
    assert (folder / "runs/실행/launch/hostfile").read_text() == "node-2 slots=4\n"
    line = failure(capsys, "cluster=openmpi", "cluster.hostfile=hosts", "cluster.include=node-1:1")
    assert "cluster.include=node-1:1 must leave the first slots of each host" in line


def test_torchrun_on_every_node(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = printed(capsys, "cluster=torchrun", *TWO)
    for node, words in enumerate(both):
        variables, words = split(words)
        assert int(variables["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
        given = get_args_parser().parse_args(words[3:])
        assert (given.nnodes, given.nproc_per_node, given.node_rank) == ("2", "2", node)
        assert (given.master_addr, given.master_port, given.module) == ("node-1", 29500, True)
        below = f"node-{node}" if node else ""
        assert [given.training_script, *given.training_script_args] == ranks_command(folder, below)
    assert [printed(capsys, "cluster=torchrun", *TWO, f"cluster.node_rank={node}") for node in (0, 1)] == [
        [both[0]], [both[1]]
    ]  # fmt: skip
    launch = folder / "runs/실행/launch"
    assert (launch / "config.yaml").read_bytes() == (launch / "node-1" / "config.yaml").read_bytes()


def test_deepspeed_without_ssh(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = printed(capsys, "cluster=deepspeed", "cluster.ssh=false", "cluster.hostfile=hosts")
    for node, words in enumerate(both):
        given = parse_args(split(words)[1][1:])
        assert (given.no_ssh, given.node_rank, given.master_addr) == (True, node, "node-1")
        assert Path(given.hostfile).read_text() == "node-1 slots=4\nnode-2 slots=4\n"


def test_what_is_written_is_what_ranks_start_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replicas that a layout names are as many as there are; the number of a node is no part of it."""
    printed(capsys, "cluster=torchrun", *TWO, "cluster.node_rank=0", "parallel.data_parallel_size=4")
    written = yaml.safe_load((folder / "runs/실행/launch/config.yaml").read_text())
    assert written["defaults"] == ["pretrain_schema", "_self_"]
    assert written["cluster"]["node_rank"] is None
    assert written["parallel"]["data_parallel_size"] == 4
    assert "dry_run" not in written
    shown = command("-m", "megakor.pretrain", *ranks_command(folder)[1:], "--cfg", "job", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert "run: runs/실행\n" in shown.stdout


def test_instruct(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["launch", "experiment=instruct_demo", "launch.num_ranks=1", "--dry-run"])
    assert " megakor.instruct --config-dir " in capsys.readouterr().out


def test_standard_output_holds_nothing_else(folder: Path) -> None:
    """Where DeepSpeed is imported, too: without launch.num_ranks the machine's slots are counted."""
    done = command("-m", "megakor", *DEMO, cwd=folder)
    (line,) = done.stdout.splitlines()
    assert " --module megakor.pretrain --config-dir " in line


@pytest.mark.parametrize(("arguments", "message"), [
    (["cluster=deepspeed"], "cluster.hostfile=launch/hostfile must be a file"),
    (["cluster=deepspeed", "cluster.hostfile=null"], "cluster.hostfile must be given with cluster.kind=deepspeed"),
    (["cluster=deepspeed", "cluster.hostfile=hosts", "run='runs/a b'"], "must not contain ' ': remote shells read it"),
    (["cluster=deepspeed", "cluster.hostfile=hosts", "cluster.secrets=NOT_SET_HERE"],
     "cluster.secrets=NOT_SET_HERE must be a variable of the environment here"),
    (["cluster=deepspeed", "cluster.hostfile=hosts", "cluster.num_nodes=1", "parallel.tensor_parallel_size=2",
      "parallel.pipeline_parallel_size=4"], "4 slots must hold at least one replica"),
    (["cluster=torchrun", "cluster.num_nodes=2"], "cluster.master_address must be given with 2 nodes and no host file"),
    (["cluster=torchrun", "cluster.ranks_per_node=null"], "cluster.ranks_per_node must be given with cluster.kind="),
    (["cluster=torchrun", *TWO, "cluster.node_rank=2"], "cluster.node_rank=2 must be at most 1: there are 2 nodes"),
    (["cluster=torchrun", *TWO, "parallel.pipeline_parallel_size=3"],
     "cluster.num_nodes=2 × cluster.ranks_per_node=2 = 4 ranks must be a number that the layout takes; nearest: 3"),
    (["cluster=deepspeed", "cluster.ssh=false", "cluster.hostfile=hosts", "parallel.pipeline_parallel_size=3"],
     "cluster.hostfile=hosts must have as many slots as the layout takes, not 8; nearest: 6"),
    (["cluster=slurm", "cluster.num_nodes=2", "parallel.data_parallel_size=4"],
     "cluster.num_nodes=2 × cluster.ranks_per_node=8 = 16 ranks must be a number that the layout takes; nearest: 4"),
])  # fmt: skip
def test_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in failure(capsys, *arguments)


def started(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a start that is none."""
    with pytest.raises(SystemExit):
        main([*DEMO[:-1], *arguments])
    return capsys.readouterr().err


def test_which_node_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cluster.node_rank must be given on every node, 0 to 1" in started(capsys, "cluster=torchrun", *TWO)


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = started(capsys, "cluster=torchrun", "cluster.ranks_per_node=1", f"cluster.master_port={port}")
    assert f"cluster.master_port={port} must be free on 127.0.0.1" in line


def test_more_slots_than_accelerators(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("hosts").write_text(f"{socket.gethostname()} slots=4\n")
    monkeypatch.setattr("megakor.train.device.num_slots", lambda wanted: 2)  # a machine with two
    monkeypatch.setattr("megakor.launch.over_ssh.program", lambda name, rule: name)
    line = started(capsys, "cluster=deepspeed", "cluster.hostfile=hosts")
    assert f"slots=4 of {socket.gethostname()} must be at most its 2 accelerators" in line


def test_a_missing_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    line = started(capsys, "cluster=deepspeed", "cluster.hostfile=hosts")
    assert "the `pdsh` command must be on PATH" in line
    line = started(capsys, "cluster=kubernetes")
    assert "the `kubectl` command must be on PATH" in line


def test_one_launch_at_a_time(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    from filelock import FileLock

    lock = folder / "runs/실행/launch/lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        assert "must be a run that no other megakor launch is watching over" in failure(capsys, "launch.num_ranks=1")


def test_a_lost_first_host_hands_over(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """An address that was given is the first host's alone."""
    from megakor.launch.folder import LaunchFolder
    from megakor.launch.over_ssh import OverSsh
    from tests.config.commands import quickly_composed

    words = ["cluster=deepspeed", "cluster.hostfile=hosts", "cluster.master_address=10.0.0.1", "launch.elastic=true"]
    config = quickly_composed("launch pretrain", "experiment=demo", f"run={folder}/run", *words,
                              "parallel.data_parallel_size=8")  # fmt: skip
    launcher = OverSsh(config, LaunchFolder(config))
    monkeypatch.setattr("megakor.launch.over_ssh.program", lambda name, rule: name)
    monkeypatch.setattr("megakor.launch.over_ssh.unreachable", lambda names: {})
    assert launcher.slots() == 8
    assert "--master_addr 10.0.0.1 " in str(launcher.command(8))
    monkeypatch.setattr("megakor.launch.over_ssh.unreachable", lambda names: {"node-1": "silent"})
    assert launcher.slots() == 4
    assert "--master_addr node-2 " in str(launcher.command(4))
    written = yaml.safe_load((folder / "run/launch/config.yaml").read_text())
    assert written["parallel"]["data_parallel_size"] == 4
    assert hosts.read_hosts(folder / "run/launch/hostfile") == {"node-2": [0, 1, 2, 3]}


def test_templates_are_found() -> None:
    from megakor.launch.folder import template_folder

    assert template_folder() == ROOT / "launch"


def test_what_deepspeed_gives_remote_shells(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own runner, with a pdsh that shows its arguments. A secret it would hand on, by the beginning of its name."""
    (folder / "bin").mkdir()
    (folder / "bin" / "pdsh").write_text('#!/bin/sh\nprintf "<%s>\\n" "$@"\n')
    (folder / "bin" / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "열려라참깨")
    options = ["cluster=deepspeed", "cluster.hostfile=hosts", "cluster.environment.ODD='b c; 한글'"]
    main([*DEMO, *options, "cluster.secrets=MLFLOW_TRACKING_TOKEN"])
    line = capsys.readouterr().out
    shown = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert "<-w>\n<node-1,node-2>\n" in shown
    assert 'export ODD="b c; 한글";' in shown
    assert "".join(f"<{word}>\n" for word in ranks_command(folder)) in shown
    assert "열려라참깨" not in line + shown
