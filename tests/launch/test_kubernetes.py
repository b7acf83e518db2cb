"""The manifests, against Kubernetes' own schemas: what JobSet and PyTorchJob hold as the Job and the Pod that it is."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser

from megakor.cli import main
from megakor.launch.kubernetes import job_name

VERSION = "1.30"
SECRET = "열려라참깨"
ODD = 'a: b #c "d" $e 한글'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGAKOR_SECRET", SECRET)
    return tmp_path


def manifests(*arguments: str) -> dict[str, Any]:
    """What a dry run writes, by kind."""
    main(["launch", "experiment=demo", "name=첫 실행", "run=runs/실행", "cluster=kubernetes", "cluster.num_nodes=3",
          "launch.restarts=4", "cluster.interface=eth0", f"cluster.environment.ODD={ODD}", *arguments,
          "--dry-run"])  # fmt: skip
    text = Path("runs/실행/launch/manifest.yaml").read_text(encoding="utf-8")
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}


def valid(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def check_pod(spec: dict[str, Any], name: str, master: str, node_rank: str) -> None:
    """A pod of the job: sound, with what its ranks need."""
    metadata = {"name": name, "namespace": "default"}
    valid({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    (container,) = spec["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["ODD"]["value"] == ODD
    assert variables["GLOO_SOCKET_IFNAME"]["value"] == "eth0"
    assert variables["MEGAKOR_SECRET"]["valueFrom"] == {"secretKeyRef": {"name": name, "key": "MEGAKOR_SECRET"}}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert volumes["work"]["persistentVolumeClaim"] == {"claimName": "megakor"}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"work": "/work", "config": "/etc/megakor", "shared-memory": "/dev/shm"}
    (line,) = container["args"]
    subprocess.run(["sh", "-n", "-c", line], check=True)
    words = shlex.split(line.partition("&&")[0])
    given = get_args_parser().parse_args([word.replace(f"${node_rank}", "2") for word in words[3:]])
    assert (given.nnodes, given.nproc_per_node, given.node_rank, given.master_addr) == ("3", "8", 2, master)
    assert [given.training_script, *given.training_script_args] == [
        "megakor.pretrain", "--config-dir", "/etc/megakor", "--config-name", "config"
    ]  # fmt: skip


def test_jobset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = manifests("cluster.secrets=MEGAKOR_SECRET")
    launch = folder / "runs/실행/launch"
    assert capsys.readouterr().out == shlex.join(
        ["kubectl", "apply", "-f", str(launch / "manifest.yaml"), "-f", str(launch / "secret.yaml")]
    ) + "\n"  # fmt: skip
    name = job_name("첫 실행")
    valid(found["ConfigMap"])
    valid(found["Service"])
    assert found["ConfigMap"]["data"]["config.yaml"] == (launch / "config.yaml").read_text(encoding="utf-8")
    assert found["Service"]["spec"]["clusterIP"] == "None"
    assert found["Service"]["metadata"]["name"] == found["JobSet"]["spec"]["network"]["subdomain"] == name
    assert found["JobSet"]["spec"]["failurePolicy"] == {"maxRestarts": 4}
    (replicated,) = found["JobSet"]["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    valid({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": job})
    assert (job["completionMode"], job["parallelism"], job["completions"]) == ("Indexed", 3, 3)
    check_pod(job["template"]["spec"], name, f"{name}-node-0-0.{name}", "JOB_COMPLETION_INDEX")


def test_pytorchjob() -> None:
    found = manifests("cluster.secrets=MEGAKOR_SECRET", "cluster.kubernetes.job=pytorchjob")
    valid(found["Service"])
    replicas = found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    assert {kind: replica["replicas"] for kind, replica in replicas.items()} == {"Master": 1, "Worker": 2}
    name = job_name("첫 실행")
    for replica in replicas.values():
        check_pod(replica["template"]["spec"], name, f"{name}-master-0", "RANK")
        assert replica["template"]["spec"]["containers"][0]["name"] == "pytorch"  # the operator looks for this name
    alone = manifests("cluster.secrets=MEGAKOR_SECRET", "cluster.kubernetes.job=pytorchjob", "cluster.num_nodes=1")
    assert list(alone["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def test_a_secret_stands_in_its_own_file_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests("cluster.secrets=MEGAKOR_SECRET")
    told = capsys.readouterr()
    assert SECRET not in told.out + told.err
    path = folder / "runs/실행/launch/secret.yaml"
    holding = [file for file in folder.rglob("*") if file.is_file() and SECRET in file.read_text(encoding="utf-8")]
    assert holding == [path]
    assert path.stat().st_mode & 0o777 == 0o600
    secret = yaml.safe_load(path.read_text(encoding="utf-8"))
    valid(secret)
    assert secret["stringData"] == {"MEGAKOR_SECRET": SECRET}
    manifests()
    assert not path.exists()


def test_without_accelerators() -> None:
    job = manifests("cluster.kubernetes.accelerator=")["JobSet"]["spec"]["replicatedJobs"][0]["template"]
    assert "resources" not in job["spec"]["template"]["spec"]["containers"][0]


def test_a_stopped_run_counts_as_failed(folder: Path) -> None:
    """So that JobSet starts it again: the last words of the pod's command, in a shell."""
    job = manifests()["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    (line,) = job["template"]["spec"]["containers"][0]["args"]
    check = "true && " + line.partition("&&")[2]
    record = folder / "runs/실행/exit.json"
    statuses = []
    for outcome in ("stopped", "finished"):
        record.write_text(f'{{"outcome": "{outcome}", "reason": ""}}\n')
        statuses.append(subprocess.run(["sh", "-c", check], check=False).returncode)
    record.unlink()
    statuses.append(subprocess.run(["sh", "-c", check], stderr=subprocess.DEVNULL, check=False).returncode)
    assert statuses == [1, 0, 0]


@pytest.mark.parametrize(("name", "expected"), [
    ("12_8b_256xa100", r"12-8b-256xa100"), ("demo", r"demo"), ("첫 실행", r"run-[0-9a-f]{6}"),
    ("a" * 90, r"a{40}-[0-9a-f]{6}"), ("My.Run", r"my-run-[0-9a-f]{6}"),
])  # fmt: skip
def test_names(name: str, expected: str) -> None:
    assert re.fullmatch(expected, job_name(name))
    assert job_name(name) != job_name(name + "x")
