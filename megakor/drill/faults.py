"""What befalls a run in a drill: ranks that die, also while they save, disks that fill up, files that are damaged."""

from __future__ import annotations

import random
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import psutil

from megakor.checkpoint.format import ASIDE, FOLDER, step_of
from megakor.checkpoint.reader import newest_whole

POLL_SECONDS = 0.005


def ranks_of(launcher: Popen[bytes]) -> dict[int, psutil.Process]:
    """The ranks that a launcher has started and that still live, by number."""
    found = {}
    with suppress(psutil.Error):
        for child in psutil.Process(launcher.pid).children(recursive=True):
            with suppress(psutil.Error, KeyError, ValueError):
                if "megakor.pretrain" in child.cmdline() and "LOCAL_RANK" in child.environ():
                    found[int(child.environ()["RANK"])] = child
    return found


def end(launcher: Popen[bytes]) -> None:
    """SIGKILL to a launcher and all that it has started."""
    with suppress(psutil.Error):
        everyone = psutil.Process(launcher.pid).children(recursive=True)
        for process in (*everyone, psutil.Process(launcher.pid)):
            with suppress(psutil.Error):
                process.kill()
    launcher.wait()


@dataclass(frozen=True)
class Scene:
    """A run that goes on, and the dice.

    Attributes:
        run: its folder.
        launcher: its process.
        dice: chooses rank, file and byte.
    """

    run: Path
    launcher: Popen[bytes]
    dice: random.Random

    def random_rank(self) -> tuple[int, psutil.Process] | None:
        ranks = ranks_of(self.launcher)
        return self.dice.choice(sorted(ranks.items(), key=lambda item: item[0])) if ranks else None

    def wait_for_saving(self, seconds: float = 20.0) -> None:
        """Until a checkpoint is being written."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.launcher.poll() is None:
            if any((self.run / FOLDER).glob(f"*{ASIDE}/rank-*")):
                return
            time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class Damage:
    """What was done, in words, and the step of the checkpoint that was damaged on purpose, if one was."""

    words: str
    damaged: int | None = None


def kill_rank(scene: Scene) -> Damage:
    """SIGKILL to a rank."""
    chosen = scene.random_rank()
    if chosen is None:
        return Damage("killed nothing: the run had ended")
    number, process = chosen
    with suppress(psutil.Error):
        process.kill()
    return Damage(f"SIGKILL to rank {number}")


def kill_while_saving(scene: Scene) -> Damage:
    """SIGKILL to a rank as soon as it has begun to write a checkpoint, or a little later."""
    scene.wait_for_saving()
    time.sleep(scene.dice.uniform(0, 0.03))
    return Damage(kill_rank(scene).words + " while saving")


def kill_everything(scene: Scene) -> Damage:
    """SIGKILL to the launcher and all ranks, as when the power fails."""
    end(scene.launcher)
    return Damage("SIGKILL to all")


def ask_to_stop(scene: Scene) -> Damage:
    """SIGTERM to a rank, which ends the run well."""
    chosen = scene.random_rank()
    if chosen is None:
        return Damage("asked nobody: the run had ended")
    with suppress(psutil.Error):
        chosen[1].send_signal(signal.SIGTERM)
    return Damage(f"SIGTERM to rank {chosen[0]}")


def fill_the_disk(scene: Scene) -> Damage:
    """From now on no file of a rank may grow past some kilobytes: its next save fails as on a full disk."""
    chosen = scene.random_rank()
    if chosen is None:
        return Damage("filled nothing: the run had ended")
    number, process = chosen
    with suppress(psutil.Error):
        process.rlimit(psutil.RLIMIT_FSIZE, (scene.dice.choice([0, 4096, 20_000]), resource.RLIM_INFINITY))
    return Damage(f"disk full for rank {number}")


def damage_a_file(scene: Scene) -> Damage:
    """SIGKILL to all; then a file of the newest checkpoint is flipped at a bit, cut, removed, or one is added."""
    end(scene.launcher)
    folder = newest_whole(scene.run, contents=True)
    if folder is None:
        return Damage("SIGKILL to all; no checkpoint was there to damage")
    file = scene.dice.choice(sorted(folder.iterdir()))
    how = scene.dice.choice(["flipped a bit of", "cut", "removed", "added a file beside"])
    content = bytearray(file.read_bytes())
    if how == "cut":
        file.write_bytes(content[: scene.dice.randrange(len(content))])
    elif how == "removed":
        file.unlink()
    elif how == "added a file beside":
        (folder / "rank-99999.safetensors").write_bytes(b"?")
    else:
        content[scene.dice.randrange(len(content))] ^= 1 << scene.dice.randrange(8)
        file.write_bytes(content)
    return Damage(f"SIGKILL to all; {how} {folder.name}/{file.name}", step_of(folder))


FAULTS: dict[Callable[[Scene], Damage], int] = {
    kill_rank: 3, kill_while_saving: 3, kill_everything: 1, ask_to_stop: 1, fill_the_disk: 1, damage_a_file: 2,
}  # fmt: skip
"""How often each comes, in proportion."""
