"""A resolved configuration, written down, composes to itself: whatever its values are, and for every shipped run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megakor.config.resolved import plain, resolved_yaml, write_resolved
from megakor.config.verbs import VERBS
from tests.config.commands import NEEDED, composed, quickly_composed
from tests.config.test_shipped import EXPERIMENTS

ODD = [
    "run=실행/첫 번째", "name='콤마, 따옴표'", "train.batch_sizes={100: 2, 7: 4}", "data.train=null",
    "data.sources.위키=a", "data.sources.뉴스=b", "data.skip=[[1, 2], [5, 9]]",
    "deepspeed={zero_optimization: {reduce_bucket_size: 5e8, overlap_comm: true}, dump_state: false, tag: '1e3'}",
    "cluster.environment={NCCL_DEBUG: INFO, ZERO: '0', YES: 'yes'}", "cluster.secrets=[WANDB_API_KEY]",
    "cluster.slurm.options=[--exclusive,--mem=0]", "optimizer.lr=1e-05", "health.hang_seconds=null",
]  # fmt: skip


def start(folder: Path, verb: str, config: Any, *overrides: str) -> Any:
    """What a rank composes from the file of a configuration."""
    write_resolved(folder / "config.yaml", verb, plain(config))
    return composed(verb, "--config-dir", str(folder), "--config-name", "config", *overrides)


@pytest.mark.parametrize("verb", ["pretrain", "instruct"])
def test_odd_values(tmp_path: Path, verb: str) -> None:
    odd = [word for word in ODD if verb == "pretrain" or not word.startswith(("data", "train.batch"))]
    config = composed(verb, *NEEDED[verb], *odd)
    assert config.deepspeed["tag"] == "1e3"
    assert start(tmp_path / "한 폴더", verb, config) == config


def test_text_that_looks_like_a_reference(tmp_path: Path) -> None:
    config = quickly_composed("pretrain", *NEEDED["pretrain"])
    config.name = r"${run} \${run} \\${run} ${"
    config.deepspeed = {"${x}": ["${y}", {"z": "${train.seed}"}]}
    assert start(tmp_path, "pretrain", config) == config


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_shipped_runs(tmp_path: Path, experiment: str) -> None:
    verb = next(name for name in ("pretrain", "instruct") if VERBS[name].owns_experiment(experiment))
    config = quickly_composed(verb, f"experiment={experiment}")
    assert start(tmp_path, verb, config) == config


def test_keys_go_on_top(tmp_path: Path) -> None:
    config = quickly_composed("pretrain", *NEEDED["pretrain"])
    changed = start(tmp_path, "pretrain", config, "train.seed=5", "name=이름", "deepspeed.dump_state=true")
    assert (changed.train.seed, changed.name, changed.deepspeed) == (5, "이름", {"dump_state": True})
    differing = [field.name for field in fields(config) if getattr(config, field.name) != getattr(changed, field.name)]
    assert differing == ["name", "train", "deepspeed"]


def test_a_mistake_in_the_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = plain(quickly_composed("pretrain", *NEEDED["pretrain"]))
    config["train"]["num_stps"] = 5
    write_resolved(tmp_path / "config.yaml", "pretrain", config)
    with pytest.raises(SystemExit):
        composed("pretrain", "--config-dir", str(tmp_path), "--config-name", "config")
    assert "num_stps" in capsys.readouterr().err


TEXT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]) | st.sampled_from("\n\t${}\\'\""))
"""Without control characters, some of which PyYAML does not give back."""


@given(st.dictionaries(TEXT, TEXT | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()))
def test_any_value(values: dict[str, Any]) -> None:
    values = {name: value for name, value in values.items() if value != "???"}  # OmegaConf's own word for no value
    text = resolved_yaml("pretrain", {"deepspeed": values})
    assert OmegaConf.to_container(OmegaConf.create(text), resolve=True)["deepspeed"] == values  # type: ignore[index,call-overload]
