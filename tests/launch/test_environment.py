"""What every rank's environment holds, and what a remote shell would make of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import parse_args

from megakor.config.schema import ClusterConfig
from megakor.launch.environment import environment_file, own_variables, rank_environment


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path


def test_later_ones_win(homes: Path) -> None:
    (homes / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nHOME_ONE=1\nTOKEN_FILE=t\nAPI_KEY=k\n")
    (homes / "work" / ".deepspeed_env").write_text("# 여기\n\nHOME_ONE=2\nNCCL_SOCKET_IFNAME=eth9\nA=b=c\n")
    cluster = ClusterConfig(interface="ib0", environment={"A": "ours"}, secrets=["API_KEY"])
    here = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/code", "HISTFILE": "x", "UCX_TLS": "rc", "API_KEY": "k"}
    assert rank_environment(cluster, here) == {
        "A": "ours", "GLOO_SOCKET_IFNAME": "ib0", "HOME_ONE": "2", "NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "ib0",
        "PYTHONPATH": "/code", "TOKEN_FILE": "t", "UCX_TLS": "rc",
    }  # fmt: skip
    assert own_variables(cluster) == {"A": "ours", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}


def test_another_name_of_the_file(homes: Path) -> None:
    (homes / "work" / "of_the_team").write_text("A=b\n")
    assert rank_environment(ClusterConfig(), {"DS_ENV_FILE": "of_the_team"}) == {"A": "b"}
    assert rank_environment(ClusterConfig(), {"DS_ENV_FILE": str(homes / "work" / "of_the_team")}) == {"A": "b"}


def test_a_bad_line(homes: Path) -> None:
    (homes / "work" / ".deepspeed_env").write_text("A=b\nNCCL_DEBUG\n")
    with pytest.raises(ValueError, match=r"\.deepspeed_env: line 2, 'NCCL_DEBUG', must be NAME=value$"):
        rank_environment(ClusterConfig(), {})


@pytest.mark.parametrize("sign", ['"', "$", "`", "\\", "%", "!", "\n"])
def test_what_remote_shells_read_is_refused(sign: str) -> None:
    with pytest.raises(ValueError, match=r"^X='a.*b' must not contain .* remote shells read it"):
        environment_file({"X": f"a{sign}b"})


def test_values_come_out_of_deepspeeds_shell_as_they_went_in(tmp_path: Path) -> None:
    """Its runner writes `export NAME=value; …` in front of the remote command; a shell here reads it."""
    values = {
        "A": "b c;d|e&f>(g)",
        "HANGUL": "한글 값",
        "PLAIN": "/a:b",
        "QUOTE": "it's #1",
        "EMPTY": "",
        "GLOB": "* ~",
    }
    runner = PDSHRunner(parse_args(["--hostfile", "h", "--master_addr", "a", "x.py"]), "")
    for line in environment_file(values).splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    for name, value in values.items():
        done = subprocess.run(
            ["sh", "-c", f'{exports} printf %s "${name}"'], capture_output=True, text=True, check=True
        )
        assert done.stdout == value
