from __future__ import annotations

import gc
from pathlib import Path

import pytest

from megakor.config.compose import config_folder, main
from megakor.config.schema import ModelConfig, Precision, PretrainConfig
from megakor.config.verbs import VERBS
from megakor.plan.hardware import known_hardware
from tests.config.commands import NEEDED, PRETRAIN, composed

EXPERIMENTS = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))
CLUSTERS = sorted(path.stem for path in (config_folder() / "cluster").glob("*.yaml"))
MODELS = sorted(path.stem for path in (config_folder() / "model").glob("*.yaml"))

TOKENS = {"1_3b_polyglot": 213e9, "3_8b_polyglot": 219e9, "5_8b_polyglot": 172e9, "12_8b_256xa100": 167e9}
"""Token budgets of Polyglot-Ko."""


def test_every_yaml_belongs_to_a_test() -> None:
    known = {f"{verb.config_name}.yaml" for verb in VERBS.values()}
    known |= {f"experiment/{name}.yaml" for name in EXPERIMENTS} | {f"model/{name}.yaml" for name in MODELS}
    known |= {f"cluster/{name}.yaml" for name in CLUSTERS}
    known |= {f"hardware/{name}.yaml" for name in known_hardware()}  # tests/plan reads each of them
    folder = config_folder()
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == known
    assert len(EXPERIMENTS) >= 6
    assert len(MODELS) >= 5


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_compose(verb: str) -> None:
    assert type(composed(verb, *NEEDED[verb])) is VERBS[verb].schema


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compose(experiment: str) -> None:
    verb = next(verb for verb in VERBS.values() if verb.groups and verb.owns_experiment(experiment))
    config = composed(verb.name, f"experiment={experiment}")
    assert config.name == experiment
    assert (config_folder() / "experiment" / f"{experiment}.yaml").read_text().startswith("# @package _global_\n")


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters_compose(cluster: str) -> None:
    assert composed("launch pretrain", "experiment=demo", f"cluster={cluster}").cluster.kind.value == cluster


@pytest.mark.parametrize("model", MODELS)
def test_models_compose(model: str) -> None:
    assert isinstance(composed("pretrain", *PRETRAIN, f"model={model}").model, ModelConfig)


@pytest.mark.parametrize(("experiment", "tokens"), TOKENS.items())
def test_token_budgets(experiment: str, tokens: float) -> None:
    config = composed("pretrain", f"experiment={experiment}")
    assert isinstance(config, PretrainConfig)
    per_step = config.train.global_batch_size * config.train.sequence_length
    assert tokens <= config.train.num_steps * per_step < tokens + per_step
    assert config.train.precision is Precision.bf16
    assert (config.schedule.warmup_ratio, config.schedule.min_lr_ratio, config.train.clip_grad_norm) == (0.01, 0.1, 1)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)


def test_overrides_win_over_the_experiment() -> None:
    plain = composed("pretrain", "experiment=demo")
    config = composed("pretrain", "experiment=demo", "train.num_steps=7", "model.hidden_size=96", "name=다른")
    assert (config.train.num_steps, config.model.hidden_size, config.name) == (7, 96, "다른")
    config.train.num_steps, config.model.hidden_size = plain.train.num_steps, plain.model.hidden_size
    config.name = plain.name
    assert config == plain


def test_a_model_by_name_survives_the_experiment() -> None:
    config = composed("pretrain", "experiment=1_3b_polyglot", "model=3_8b")
    assert config.model.hidden_size == 3072


def test_the_run_folder_follows_the_name() -> None:
    arguments = [argument for argument in PRETRAIN if not argument.startswith("run=")]
    assert composed("pretrain", *arguments, "name=한글 이름").run == "runs/한글 이름"


def test_the_collector_is_at_work_when_a_verb_runs() -> None:
    """Mains import their modules without it."""
    seen: list[bool] = []
    gc.disable()
    try:
        main("report", lambda config: seen.append(gc.isenabled()), ["run=r"])
        assert seen == [True]
    finally:
        gc.enable()


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    composed("pretrain", "experiment=demo")
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())
