"""What the kinds of cluster have in common whose runs are started from here and watched over."""

from __future__ import annotations

from abc import ABC, abstractmethod

from megakor.launch.command import Command


class Launcher(ABC):
    """Starts a run's ranks by a command that lasts as long as they do."""

    @abstractmethod
    def slots(self) -> int:
        """Ranks that there is room for now; asked before every start. OSError, ValueError when none can be made."""

    @abstractmethod
    def command(self, num_ranks: int) -> Command:
        """The command for so many ranks, of at most `slots()`; the files that it needs are written."""

    def all_slots(self) -> int:
        """Ranks that there is room for when everything is as configured; asks no other machine."""
        return self.slots()

    def commands(self, num_ranks: int) -> list[Command]:
        """What would be run, here and on nodes that are started by hand."""
        return [self.command(num_ranks)]
