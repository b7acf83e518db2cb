"""A checkpoint of adapters read as a whole model: any range of any weight, over a base that must be the right one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakor.checkpoint.format import MANIFEST, AdapterEntry
from megakor.checkpoint.reader import CheckpointValues, check_whole, load_model, open_weights, read_weights
from megakor.checkpoint.save import save_checkpoint
from megakor.checkpoint.universal import export_universal
from megakor.config.schema import ExportUniversalConfig, LoraConfig, LoraTarget
from megakor.files import sha256_of
from megakor.instruct.adapters import adapter_entry
from megakor.model.lora import adapter_specs, adapters_of
from megakor.model.specs import Shard, parameter_specs
from megakor.train.optimizer import Piece
from tests.checkpoint.pieces import MODEL, edit, manifest, save, state
from tests.parallel.shards import value

LORA = LoraConfig(rank=3, alpha=4.5, targets=[LoraTarget.query_key_value, LoraTarget.dense_4h_to_h])
NAMES = [spec.name for spec in parameter_specs(MODEL)]
SHARD_DIMS = {spec.name: spec.shard_dim for spec in parameter_specs(MODEL)}


def adapters(salt: str, lora: LoraConfig = LORA) -> dict[str, torch.Tensor]:
    return {spec.name: value(salt + spec.name, *spec.shape) for spec in adapter_specs(MODEL, lora)}


def save_adapters(run: Path, base: Path, salt: str, num_shards: int = 1) -> Path:
    """A checkpoint of adapters, as tensor ranks would have cut them."""
    pieces = []
    for spec in adapter_specs(MODEL, LORA):
        for index in range(1 if spec.shard_dim is None else num_shards):
            shard = spec.shard(index, num_shards)
            values = shard.of(adapters(salt)[spec.name]).flatten()
            pieces.append(Piece("weight", spec.name, spec.shape, shard, 0, values, True))
            pieces.append(Piece("exp_avg", spec.name, spec.shape, shard, 0, torch.zeros_like(values), True))
    return save_checkpoint(run, manifest(7, adapters=adapter_entry(LORA, base, 5)), pieces)


def merged(weights: dict[str, torch.Tensor], salt: str) -> dict[str, torch.Tensor]:
    """By hand, in fp64."""
    found, factors = dict(weights), adapters(salt)
    for name, weight in weights.items():
        down, up = adapters_of(name)
        if up in factors:
            found[name] = (weight.double() + 1.5 * factors[up].double() @ factors[down].double()).float()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, adapters of it that were saved whole and in two shards, and adapters of the merged model."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    folder = tmp_path_factory.mktemp("merged")
    found = {"base": save(folder / "base", 5)}
    found["whole"] = save_adapters(folder / "whole", found["base"], "a")
    found["cut"] = save_adapters(folder / "cut", found["base"], "a", num_shards=2)
    found["again"] = save_adapters(folder / "again", found["cut"], "b")
    torch.distributed.destroy_process_group()
    return found


def expected(name: str) -> dict[str, torch.Tensor]:
    weights = {name: tensor for (kind, name), tensor in state().items() if kind == "weight"}
    first = merged(weights, "a")
    return {"base": weights, "whole": first, "cut": first, "again": merged(first, "b")}[name]


@pytest.mark.parametrize("name", ["base", "whole", "cut", "again"])
def test_weights_are_the_base_s_and_the_adapters_product(folders: dict[str, Path], name: str) -> None:
    found, wanted = read_weights(folders[name]), expected(name)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    model, _ = load_model(folders[name])
    assert all(torch.equal(parameter, wanted[key]) for key, parameter in model.named_parameters())


@pytest.mark.parametrize("folder", ["whole", "cut", "again"])
@pytest.mark.parametrize("name", NAMES)
def test_every_shard(folders: dict[str, Path], name: str, folder: str) -> None:
    """Bit for bit that of the whole: how ranks cut a base does not show in what they train on."""
    whole, dim = expected(folder)[name], SHARD_DIMS[name]
    with open_weights(folders[folder]) as values:
        for shard in [Shard(dim, index, 2) for index in range(2)] if dim is not None else [Shard()]:
            part = shard.of(whole).flatten()
            assert torch.equal(values.read("weight", name, 0, part.numel(), shard), part)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_of_any_shard(folders: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in NAMES if adapters_of(name)[0] in adapters("a")]))
    folder = data.draw(st.sampled_from(["whole", "cut", "again"]))
    dim, count = SHARD_DIMS[name], data.draw(st.sampled_from([1, 2]))
    shard = Shard(dim, data.draw(st.integers(0, count - 1)), count) if dim is not None else Shard()
    part = shard.of(expected(folder)[name]).flatten()
    start = data.draw(st.integers(0, part.numel()))
    stop = data.draw(st.integers(start, part.numel()))
    with open_weights(folders[folder]) as values:
        assert torch.equal(values.read("weight", name, start, stop, shard), part[start:stop])
        out = torch.full((stop - start,), torch.nan, dtype=torch.bfloat16)
        values.fill(out, "weight", name, start, shard)
        assert torch.equal(out, part[start:stop].bfloat16())


def test_a_merged_model_begins_without_optimizer_state(folders: dict[str, Path]) -> None:
    out = torch.ones(4)
    with open_weights(folders["cut"]) as values:
        assert values.optimizer_steps == 0
        assert values.loss_scale is None
        values.fill(out, "exp_avg", NAMES[0], 0)
        with pytest.raises(ValueError, match=f"exp_avg/{NAMES[0]} must be of weight: merged weights have no"):
            values.read("exp_avg", NAMES[0], 0, 4)
    assert not out.any()


def test_the_manifest_names_the_base(folders: dict[str, Path]) -> None:
    with CheckpointValues(folders["cut"]) as values:
        entry = values.manifest.adapters
    digest = sha256_of(folders["base"] / MANIFEST)
    assert entry == AdapterEntry(3, 4.5, ["dense_4h_to_h", "query_key_value"], str(folders["base"]), 5, digest)
    check_whole(folders["again"])


def test_a_base_that_is_gone_or_another_one_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    copies = {}
    for name in ("base", "cut"):
        copies[name] = shutil.copytree(folders[name], tmp_path / name / "checkpoints" / folders[name].name)
    edit(copies["cut"], lambda raw: raw["adapters"].update(base=str(copies["base"])))
    assert read_weights(copies["cut"]).keys() == set(NAMES)
    weights = next(copies["base"].glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        check_whole(copies["cut"])
    edit(copies["base"], lambda raw: raw.update(step=6))
    with pytest.raises(ValueError, match="base .* must be the checkpoint of step 5 that its adapters were trained on"):
        load_model(copies["cut"])
    shutil.rmtree(copies["base"])
    with pytest.raises(ValueError, match=r"its base .* must be there, since it holds adapters of it alone"):
        read_weights(copies["cut"])


def test_the_universal_format_has_no_place_for_adapters(folders: dict[str, Path], tmp_path: Path) -> None:
    run = str(folders["cut"])
    with pytest.raises(ValueError, match="must be a run that trained all parameters; megakor export writes"):
        export_universal(ExportUniversalConfig(run=run, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_damaged_entry_is_a_damaged_manifest(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["cut"], tmp_path / folders["cut"].name)
    edit(copy, lambda raw: raw["adapters"].pop("base_sha256"))
    with pytest.raises(ValueError, match=r"manifest.json: damaged .*base_sha256"):
        read_weights(copy)


def test_adapters_of_another_rank_are_another_entry(folders: dict[str, Path]) -> None:
    one, other = (adapter_entry(replace(LORA, rank=rank), folders["base"], 5) for rank in (1, 2))
    assert one != other
