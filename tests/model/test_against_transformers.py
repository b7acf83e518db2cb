from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoXConfig
from transformers import GPTNeoXForCausalLM as Theirs

from megakor.config.schema import ModelConfig
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.parameters import initial_value
from megakor.model.specs import parameter_specs
from megakor.parallel.loss import VocabularyShard, vocabulary_loss
from tests.model.configs import small

CONFIGS = {
    "parallel": small(),
    "sequential": small(use_parallel_residual=False),
    "rotary 0.25": small(rotary_pct=0.25, hidden_size=64),
    "rotary 1": small(rotary_pct=1.0),
    "rotary base": small(rotary_emb_base=500.0),
    "tied": small(tie_word_embeddings=True),
    "tied, sequential": small(tie_word_embeddings=True, use_parallel_residual=False),
    "no attention bias": small(attention_bias=False),
    "one head": small(num_attention_heads=1),
    "epsilon": small(layer_norm_eps=1e-2),
}


def theirs_of(config: ModelConfig) -> Theirs:
    return Theirs(
        GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            layer_norm_eps=config.layer_norm_eps,
            use_parallel_residual=config.use_parallel_residual,
            attention_bias=config.attention_bias,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rotary_emb_base,
                "partial_rotary_factor": config.rotary_pct,
            },
            hidden_act="gelu",
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def pair(config: ModelConfig, scale: float = 1.0) -> tuple[GPTNeoXForCausalLM, Theirs]:
    """Both models with the same weights, every one of them away from zero and one."""
    ours, theirs = GPTNeoXForCausalLM(config), theirs_of(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for spec in parameter_specs(config):
            noise = torch.randn(spec.shape, generator=generator) * 0.1 * scale
            ours.get_parameter(spec.name).copy_(initial_value(spec, 0) + noise)
    weights = dict(ours.state_dict())
    if config.tie_word_embeddings:
        weights["embed_out.weight"] = weights["gpt_neox.embed_in.weight"]
    names = {name.replace("embed_out", "lm_head"): value for name, value in weights.items()}
    if "embed_out.weight" in theirs.state_dict():
        names = weights
    left, unexpected = theirs.load_state_dict(names, strict=False)
    assert not unexpected
    assert all("rotary" in name or "attention.bias" in name for name in left), left
    return ours, theirs.train()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name: str) -> None:
    config = CONFIGS[name]
    ours, theirs = pair(config)
    ids = torch.randint(0, 64, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        found = ours(ids)
    assert found.shape == (3, 64, 64)
    assert expected.std() > 0.1  # the comparison says something
    assert (found - expected).abs().max().item() < 1e-5


@pytest.mark.parametrize("name", ["parallel", "sequential", "rotary 0.25", "rotary 1", "tied", "no attention bias"])
def test_each_difference_matters(name: str) -> None:
    """The logits above would differ if the option were lost."""
    ours, _ = pair(CONFIGS[name])
    changed = {
        "parallel": {"use_parallel_residual": False},
        "sequential": {"use_parallel_residual": True},
        "rotary 0.25": {"rotary_pct": 0.5},
        "rotary 1": {"rotary_pct": 0.5},
        "tied": {"tie_word_embeddings": False},
        "no attention bias": {"attention_bias": True},
    }[name]
    other = GPTNeoXForCausalLM(small(**{**vars(CONFIGS[name]), **changed}))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.07)
    weights = ours.state_dict()
    if name == "tied":
        weights["embed_out.weight"] = torch.full((64, 48), 0.07)
    other.load_state_dict(weights, strict=False)
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (other(ids) - ours(ids)).abs().max().item() > 1e-3


def test_nothing_looks_ahead() -> None:
    ours, _ = pair(small())
    ids = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 25:] = (changed[0, 25:] + 1) % 64
    with torch.no_grad():
        before, after = ours(ids), ours(changed)
    assert torch.equal(before[0, :25], after[0, :25])
    assert (before[0, 25:] - after[0, 25:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["parallel", "sequential", "tied", "no attention bias"])
def test_fifty_steps(name: str) -> None:
    ours, theirs = pair(CONFIGS[name], scale=0.1)

    def optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    first, second = optimizer(ours), optimizer(theirs)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(50):
        ids = torch.randint(0, 16, (4, 33), generator=generator).cumsum(1) % 64  # something to learn: small differences
        inputs, labels = ids[:, :-1], ids[:, 1:]
        scale = torch.tensor(1.0 / labels.numel())
        shard = VocabularyShard(0, 64, None, chunk=2**10)
        loss = vocabulary_loss(ours(inputs), labels, torch.ones(labels.shape), scale, shard)
        logits = theirs(inputs).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        for value, optimizer_ in ((loss, first), (expected, second)):
            optimizer_.zero_grad()
            value.backward()
            optimizer_.step()
        losses.append((loss.item(), expected.item()))
    assert losses[-1][0] < losses[0][0] - 0.3  # it learns
    assert max(abs(a - b) for a, b in losses) < 1e-4
