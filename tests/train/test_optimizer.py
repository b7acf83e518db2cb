from __future__ import annotations

import pytest
import torch

from megakor.config.schema import OptimizerConfig, OptimizerName
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.parameters import initial_value
from megakor.model.specs import WHOLE, parameter_specs
from megakor.parallel.build import Held
from megakor.train.adafactor import Adafactor, Sharing
from megakor.train.fragments import flats, fragments
from megakor.train.optimizer import build_optimizer, optimizer_pieces, optimizer_steps, prepare_state
from tests.model.configs import small


def built(name: OptimizerName, **changes: float) -> tuple[GPTNeoXForCausalLM, torch.optim.Optimizer]:
    config = small()
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for spec in parameter_specs(config):
            model.get_parameter(spec.name).copy_(initial_value(spec, 0))
    options = OptimizerConfig(name=name, lr=0.01, **changes)
    specs = {spec.name: spec for spec in parameter_specs(config)}
    return model, build_optimizer(options, list(model.named_parameters()), specs)


def whole(named: list[tuple[str, torch.nn.Parameter]], tied: str | None = None) -> dict[str, Held]:
    """Every parameter held whole; `tied` is saved by another stage."""
    specs = {spec.name: spec for spec in parameter_specs(small())}
    return {name: Held(specs[name], WHOLE, name == tied, name == tied) for name, _ in named}


@pytest.mark.parametrize("name", OptimizerName)
def test_biases_and_norms_do_not_decay(name: OptimizerName) -> None:
    model, optimizer = built(name, weight_decay=0.25)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        expected = 0.0 if "norm" in key or key.endswith("bias") else 0.25
        assert decay[id(parameter)] == expected, key


def test_adamw_takes_its_settings() -> None:
    _, optimizer = built(OptimizerName.adamw, beta1=0.8, beta2=0.97, eps=1e-6)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.97), 1e-6)


def test_decay_is_decoupled() -> None:
    """With no gradient at all, matrices shrink by lr × decay and nothing else moves."""
    model, optimizer = built(OptimizerName.adamw, weight_decay=0.5)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        factor = 1.0 if "norm" in key or key.endswith("bias") else 1.0 - 0.01 * 0.5
        torch.testing.assert_close(parameter.detach(), before[key] * factor)


def test_a_stage_without_matrices_has_no_empty_group() -> None:
    norm = torch.nn.LayerNorm(48)
    named = [(f"gpt_neox.final_layer_norm.{key}", parameter) for key, parameter in norm.named_parameters()]
    specs = {spec.name: spec for spec in parameter_specs(small())}
    optimizer = build_optimizer(OptimizerConfig(lr=0.1), named, specs)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


@pytest.mark.parametrize("name", OptimizerName)
def test_pieces_are_the_live_state(name: OptimizerName) -> None:
    model, optimizer = built(name)
    named = list(model.named_parameters())
    tensors = flats(None, optimizer, named)
    owned = fragments(named, tensors)
    held = whole(named)
    shapes = {key: parameter.shape for key, parameter in named}
    prepare_state(optimizer, owned, tensors, 4, Sharing(shapes))
    assert optimizer_steps(optimizer) == 4
    pieces = optimizer_pieces(optimizer, owned, held, first=True, first_tensor=True)
    by_state = {(piece.state, piece.name): piece for piece in pieces}
    assert len(by_state) == len(pieces)
    assert all(piece.writes and piece.offset == 0 for piece in pieces)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer_steps(optimizer) == 5
    for key, parameter in named:
        assert torch.equal(by_state["weight", key].values, parameter.detach().view(-1))
        if name is OptimizerName.adamw:
            states = ["exp_avg", "exp_avg_sq"]
        else:
            states = ["exp_avg_sq_row", "exp_avg_sq_col"] if parameter.dim() > 1 else ["exp_avg_sq"]
            assert isinstance(optimizer, Adafactor)
        assert {state for state, other in by_state if other == key} == {"weight", *states}
        for state in states:
            piece = by_state[state, key]
            assert piece.values.all(), (state, key)
            assert piece.values.numel() == torch.Size(piece.shape).numel()


def test_only_the_first_replica_writes_what_all_hold() -> None:
    model, optimizer = built(OptimizerName.adamw)
    named = list(model.named_parameters())
    tensors = flats(None, optimizer, named)
    owned = fragments(named, tensors)
    prepare_state(optimizer, owned, tensors, 0, Sharing({}))
    tied = "gpt_neox.embed_in.weight"
    first = optimizer_pieces(optimizer, owned, whole(named, tied), first=True, first_tensor=True)
    second = optimizer_pieces(optimizer, owned, whole(named), first=False, first_tensor=True)
    assert {piece.name for piece in first if not piece.writes} == {tied}
    assert not any(piece.writes for piece in second)
