"""A real sshd on the loopback addresses: every one of 127.0.0.1, 127.0.0.2, … is a host that ssh and pdsh reach."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ranks import free_port

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
MISSING = next(
    (f"no {name} here" for name, found in [("sshd", SSHD), ("ssh", shutil.which("ssh"))] if found is None), None
)


@contextmanager
def hosts_over_ssh(folder: Path) -> Iterator[dict[str, str]]:
    """While it lasts, this user may log in at any loopback address; yields the environment that ssh and pdsh need."""
    assert SSHD is not None
    keys = {name: folder / name for name in ("host_key", "user_key")}
    for path in keys.values():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    port, authorized = free_port(), folder / "authorized_keys"
    shutil.copy(keys["user_key"].with_suffix(".pub"), authorized)
    authorized.chmod(0o600)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own folder, which a service would have made
    settings = {
        "Port": port, "ListenAddress": "0.0.0.0", "HostKey": keys["host_key"], "AuthorizedKeysFile": authorized,
        "PidFile": "none", "StrictModes": "no", "UsePAM": "no", "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
    }  # fmt: skip
    configuration = folder / "sshd_config"
    configuration.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(configuration)], stderr=log)
    try:
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", port)):
            ended = server.poll() is not None or time.monotonic() > deadline
            assert not ended, (folder / "sshd.log").read_text()
            time.sleep(0.05)
        options = ["-p", str(port), "-i", str(keys["user_key"]), "-o", "StrictHostKeyChecking=no",
                   "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]  # fmt: skip
        yield {"PDSH_SSH_ARGS_APPEND": shlex.join(options)}
    finally:
        server.terminate()
        server.wait()
