"""Real steps of the layouts that the planner holds fastest: predicted and measured step time of each come out.

    configuration ─► plan search ─► the first few ─► a short run of each, one after the other ─► fastest first

Each is a run of its own under RUN/tune, started as `megakor launch` would start it; it saves and evaluates nothing.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from megakor.config.choices import OnSpike, WandbMode
from megakor.config.cluster_checks import count_and_kind
from megakor.config.schema import LaunchConfig, LaunchPretrainConfig, PlanSearchConfig, PretrainConfig, TuneConfig
from megakor.launch.folder import LaunchFolder
from megakor.launch.kinds import SUBMITTED, launcher_of
from megakor.launch.supervisor import GivenUp, Supervisor
from megakor.logs import get_logger
from megakor.plan.plan import Subject
from megakor.plan.search import Layout, search
from megakor.train.metrics import read_metrics

log = get_logger(__name__)

FOLDER = "tune"
Kind = TypeVar("Kind", bound=PretrainConfig)


@dataclass(frozen=True)
class Trial:
    """A layout that was tried.

    Attributes:
        run: folder of its run.
        seconds: median of the measured steps; None: it did not come so far.
        mfu: of that step, as runs log it.
        problem: why it did not.
    """

    layout: Layout
    run: Path
    seconds: float | None = None
    mfu: float | None = None
    problem: str | None = None


def run_keys(config: PretrainConfig, kind: type[Kind]) -> Kind:
    """A configuration of another verb with the run's keys of this one."""
    return kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(PretrainConfig)})


def candidates(config: TuneConfig, slots: int) -> list[Layout]:
    """The layouts to try, those first that the planner holds fastest.

    Raises:
        ValueError: the accelerators are not as many as the ranks that there is room for, or no layout fits.
    """
    gpus = config.cluster.gpus
    assert gpus is not None, "the verb's rules"
    if count_and_kind(gpus)[0] != slots:
        raise ValueError(f"cluster.gpus={gpus} must be as many as the ranks that there is room for, {slots}")
    planned = run_keys(config, PlanSearchConfig)
    found = search(planned, Subject.of(planned)).layouts
    if not found:
        raise ValueError(f"cluster.gpus={gpus} must hold the model: no layout fits")
    return found[: config.num_layouts]


def trial_config(config: TuneConfig, layout: Layout, run: Path) -> LaunchPretrainConfig:
    """The run of a layout: a few steps of the whole batch, and nothing else."""
    base = run_keys(config, LaunchPretrainConfig)
    num_steps = config.warmup_steps + config.num_steps
    return replace(
        base,
        run=str(run),
        parallel=layout.parallel,
        train=replace(layout.train, num_steps=num_steps, batch_sizes={}, sequence_lengths={}),
        data=replace(base.data, validation={}),
        evaluation=replace(base.evaluation, interval=0),
        checkpoint=replace(
            base.checkpoint, interval=0, restart_interval=0, keep_every=0, keep_best=None, upload=None, resume="never"
        ),
        health=replace(base.health, on_spike=OnSpike.off),
        logging=replace(base.logging, interval=1, wandb=WandbMode.disabled),
        launch=LaunchConfig(num_ranks=base.launch.num_ranks),
    )


def start(config: LaunchPretrainConfig) -> None:
    """Run it to its end. GivenUp when it fails."""
    folder = LaunchFolder(config)
    with folder.locked():
        launcher = launcher_of(config, folder)
        Supervisor(config, launcher.command, launcher.slots).supervise()


def measured(config: TuneConfig, layout: Layout, run: Path, start: Callable[[LaunchPretrainConfig], None]) -> Trial:
    """One layout, tried. One that fails, as when memory does not suffice after all, is told of and passed over."""
    try:
        start(trial_config(config, layout, run))
    except GivenUp as error:
        return Trial(layout, run, problem=str(error))
    steps = [record for record in read_metrics(run) if record["kind"] == "train"][config.warmup_steps :]
    assert len(steps) == config.num_steps
    return Trial(
        layout,
        run,
        statistics.median(step["seconds"] for step in steps),
        statistics.median(step["mfu"] for step in steps),
    )


def tune(config: TuneConfig, start: Callable[[LaunchPretrainConfig], None] = start) -> list[Trial]:
    """Try the planner's best layouts; fastest first, those that failed last.

    Raises:
        ValueError: the cluster takes jobs, which do not end while this waits; the accelerators are not those that are
            there; or no layout fits.
        GivenUp: none of them ran.
    """
    kind = config.cluster.kind
    if kind in SUBMITTED:
        raise ValueError(
            f"cluster={kind.value} must be one whose runs are watched over; inside a job, deepspeed or local"
        )
    folder = Path(config.run) / FOLDER
    plain = run_keys(config, LaunchPretrainConfig)
    slots = launcher_of(plain, LaunchFolder(plain)).slots()
    layouts = candidates(config, slots)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier one
    trials = []
    for number, layout in enumerate(layouts, start=1):
        words = " ".join(f"{key}={value}" for key, value in layout.overrides.items())
        log.info("layout %d of %d, predicted %.3f s a step: %s", number, len(layouts), layout.time.seconds, words)
        trial = measured(config, layout, folder / f"{number:02d}", start)
        if trial.seconds is None:
            log.warning("layout %d: %s", number, trial.problem)
        else:
            log.info("layout %d: %.3f s a step", number, trial.seconds)
        trials.append(trial)
    trials.sort(key=lambda trial: float("inf") if trial.seconds is None else trial.seconds)
    if trials[0].seconds is None:
        raise GivenUp(f"run={config.run}: none of {len(trials)} layouts ran; the fastest by plan: {trials[0].problem}")
    return trials
