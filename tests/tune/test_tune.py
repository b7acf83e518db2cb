"""Layouts that are tried: which, in what order, what is written; with runs that are made up, and with real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megakor.config.checks import check
from megakor.config.resolved import plain
from megakor.config.schema import LaunchPretrainConfig, TuneConfig
from megakor.launch.supervisor import GivenUp
from megakor.plan.search import values
from megakor.train.metrics import read_metrics
from megakor.tune.report import write_winner
from megakor.tune.tune import tune
from tests.config.commands import command, composed, quickly_composed
from tests.distributed.conftest import make
from tests.distributed.runs import Made

CPU = """
measured: true
memory_gib: 4
bf16_tflops: 0.2
fp16_tflops: 0.2
fp32_tflops: 0.09
memory_gb_per_s: 10
node_gb_per_s: 1
network_gb_per_s: 1
node_latency_us: 300
network_latency_us: 300
host_gb_per_s: 10
host_memory_gb_per_s: 10
watts: 50
per_node: 8
overlaps: false
"""
TINY = ["name=시험", "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2",
        "model.intermediate_size=64", "model.max_position_embeddings=64", "train.precision=fp32", "optimizer.lr=1e-3",
        "train.num_steps=100", "train.global_batch_size=8", "train.micro_batch_size=2", "train.sequence_length=32",
        "train.batch_sizes={8: 4}", "checkpoint.keep_every=2000"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"), 1300, 80_000)


def words(folder: Path, data: Made, num_ranks: int, *more: str) -> list[str]:
    (folder / "씨피유.yaml").write_text(CPU)
    return [*TINY, f"run={folder}/실행", f"data.train={data.train}", f"data.tokenizer={data.tokenizer}",
            f"launch.num_ranks={num_ranks}", f"cluster.gpus={num_ranks}x{folder}/씨피유.yaml", *more]  # fmt: skip


def configuration(folder: Path, data: Made, *more: str, num_ranks: int = 4) -> TuneConfig:
    return quickly_composed("tune", *words(folder, data, num_ranks, *more))


class MadeUp:
    """Runs whose steps take so many seconds each; a text is why one fails."""

    def __init__(self, *outcomes: list[float] | str) -> None:
        self.outcomes, self.configs = list(outcomes), list[LaunchPretrainConfig]()

    def __call__(self, config: LaunchPretrainConfig) -> None:
        check(config)
        self.configs.append(config)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, str):
            raise GivenUp(outcome)
        Path(config.run).mkdir(parents=True)
        records = [{"kind": "start", "step": 0}]
        for step, seconds in enumerate(outcome, start=1):
            records += [{"kind": "train", "step": step, "seconds": seconds, "mfu": 1 / seconds}]
        (Path(config.run) / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


SLOW, FAST = [9.0, 5.0, 3.0, 2.0, 4.0], [9.0, 5.0, 1.0, 3.0, 2.0]
STEPS = "num_steps=3"


def test_the_fastest_measured_is_first(made: Made, tmp_path: Path) -> None:
    config = configuration(tmp_path, made, "num_layouts=3", STEPS)
    runs = MadeUp(SLOW, "해 봤으나 안 됨", FAST)
    trials = tune(config, runs)
    assert [trial.seconds for trial in trials] == [2.0, 3.0, None]
    assert [trial.mfu for trial in trials] == [1 / 2.0, 1 / 3.0, None]
    assert trials[2].problem == "해 봤으나 안 됨"
    assert [trial.run.name for trial in trials] == ["03", "01", "02"]
    predicted = [trial.layout.time.seconds for trial in sorted(trials, key=lambda trial: trial.run)]
    assert predicted == sorted(predicted)


def test_a_trial_is_the_layout_and_nothing_else(made: Made, tmp_path: Path) -> None:
    config = configuration(tmp_path, made, "num_layouts=2", STEPS, "health.on_spike=act", "launch.restarts=5")
    runs = MadeUp(SLOW, FAST)
    trials = sorted(tune(config, runs), key=lambda trial: trial.run)
    for tried, trial in zip(runs.configs, trials, strict=True):
        assert values(tried.parallel, tried.train) == values(trial.layout.parallel, trial.layout.train)
        assert (tried.train.num_steps, tried.train.batch_sizes, tried.train.global_batch_size) == (5, {}, 8)
        assert (tried.checkpoint.interval, tried.evaluation.interval, tried.launch.restarts) == (0, 0, 0)
        assert tried.launch.num_ranks == 4
        assert tried.health.on_spike.value == "off"
        assert tried.logging.wandb.value == "disabled"
    assert runs.configs[0].parallel != runs.configs[1].parallel or runs.configs[0].train != runs.configs[1].train


def test_the_winner_composes_to_its_layout(made: Made, tmp_path: Path) -> None:
    config = configuration(tmp_path, made, "num_layouts=2", STEPS, f"out={tmp_path}/찾음", "data.validation.wiki=v")
    winner, *_ = tune(config, MadeUp(SLOW, FAST))
    started = write_winner(config, winner)
    assert started == ["megakor", "launch", "pretrain", f"--config-dir={tmp_path}/찾음", "experiment=시험-tuned"]
    found = composed("pretrain", f"--config-dir={tmp_path}/찾음", "experiment=시험-tuned")
    assert values(found.parallel, found.train) == values(winner.layout.parallel, winner.layout.train)
    for section in ("model", "optimizer", "schedule", "data", "checkpoint", "evaluation", "run", "name"):
        assert plain(getattr(found, section)) == plain(getattr(config, section)), section
    assert found.train.batch_sizes == {8: 4}
    assert found.train.num_steps == 100


@pytest.mark.parametrize(("arguments", "runs", "kind", "message"), [
    (["num_layouts=2"], MadeUp("첫째", "둘째"), GivenUp, "none of 2 layouts ran; the fastest by plan: 첫째"),
    (["cluster=slurm", "launch.num_ranks=null"], MadeUp(), ValueError, "cluster=slurm must be one whose runs"),
    (["cluster.gpus=3xa100-80g"], MadeUp(), ValueError, "cluster.gpus=3xa100-80g must be as many as the ranks .* 4$"),
    (["cluster.gpus=4xa100"], MadeUp(), ValueError, "a100 must be one of a100-40g"),
    (["model.hidden_size=65536", "model.num_hidden_layers=99"], MadeUp(), ValueError, "no layout fits"),
])  # fmt: skip
def test_refused(
    made: Made,
    tmp_path: Path,
    arguments: list[str],
    runs: Callable,
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        tune(configuration(tmp_path, made, *arguments), runs)


def test_an_earlier_tune_is_replaced(made: Made, tmp_path: Path) -> None:
    config = configuration(tmp_path, made, "num_layouts=1", STEPS)
    tune(config, MadeUp(SLOW))
    assert tune(config, MadeUp(FAST))[0].seconds == 2.0


def test_real_runs(made: Made, tmp_path: Path) -> None:
    arguments = words(tmp_path, made, 2, "num_layouts=2", "num_steps=2", "format=json")
    done = command("-m", "megakor", "tune", *arguments, timeout=300, env={"DS_ACCELERATOR": "cpu"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    seconds = [layout["step_seconds"] for layout in told["layouts"]]
    assert seconds == sorted(seconds)
    assert len(seconds) == 2
    for layout in told["layouts"]:
        run = Path(layout["run"])
        steps = [record for record in read_metrics(run) if record["kind"] == "train"]
        assert [step["step"] for step in steps] == [1, 2, 3, 4]
        assert not (run / "checkpoints").exists()
    assert (tmp_path / "실행" / "tune" / "experiment" / "시험-tuned.yaml").is_file()
    assert told["command"][:3] == ["megakor", "launch", "pretrain"]
