"""The configuration's types of what a run does to survive: checkpoints, and steps that go wrong."""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config.choices import OnSpike
from megakor.config.fields import key


@dataclass
class CheckpointConfig:
    interval: int = key(1000, help="save every so many steps, and at the end", unit="steps")
    keep_last: int = key(3, help="whole checkpoints kept; older ones are removed; 0: all")
    keep_every: int = key(0, help="those of multiples of so many steps stay for good; 0: none", unit="steps")
    keep_best: str | None = key(None, help="held-out set; the checkpoint with the lowest loss on it stays")
    restart_interval: int = key(
        0, help="save also every so many steps, for restarts alone: the next one replaces it; 0: never", unit="steps"
    )
    asynchronous: bool = key(True, help="train on while files are written, from a copy in host memory")
    upload: str | None = key(
        None, help="folder or address, such as s3://bucket/run, where kept checkpoints go too, and are resumed from"
    )
    resume: str = key("auto", help="auto: go on from the newest whole checkpoint; never: refuse a run folder in use")


@dataclass
class HealthConfig:
    skip_limit: int = key(
        10, help="steps in a row without a finite gradient, which change nothing, that end the run", unit="steps"
    )
    on_spike: OnSpike = key(OnSpike.warn, help="a loss or gradient norm far above those before: off, warn or act")
    spike_window: int = key(128, help="steps that say what is usual", unit="steps")
    spike_threshold: float = key(10.0, help="robust standard deviations above the median that are a spike")
    spike_skip: int = key(1, help="with act: steps before the spike whose samples are left out, too", unit="steps")
    roll_back_limit: int = key(5, help="with act: times that a run goes back, at most; later spikes are warned of")
    hang_seconds: float | None = key(
        1200.0, help="a step that takes longer ends the run, with every rank's stack; null: never", unit="s"
    )
    replica_check_interval: int = key(
        0, help="compare the replicas' weights bit by bit every so many steps; 0: never", unit="steps"
    )


@dataclass
class LaunchConfig:
    """How `megakor launch` starts a run, and starts it again; the run itself looks at `preflight` alone."""

    num_ranks: int | None = key(None, help="processes; null: one for each accelerator, on a CPU one", unit="ranks")
    restarts: int = key(0, help="times that a run which failed is started again; twice at the same step ends it")
    pause_seconds: float = key(10.0, help="before the first restart; twice as long before each further one", unit="s")
    elastic: bool = key(False, help="go on with fewer ranks where num_ranks have no room any more")
    preflight: bool = key(False, help="check the machines on all ranks, as megakor preflight does, before each start")
