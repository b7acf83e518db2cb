"""From a configuration to this rank's part of the model: the one place where training models are made.

Training and `megakor simulate` build through it, so what is simulated is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megakor.config.schema import EngineConfig, LoraConfig, ModelConfig
from megakor.model.documents import Attending, Documents, one_by_one
from megakor.model.dropout import DropoutCounter
from megakor.model.gpt_neox import GPTNeoXForCausalLM, Parts
from megakor.model.lora import adapt, adapter_specs
from megakor.model.specs import ParameterSpec, Shard, parameter_specs
from megakor.parallel.groups import Groups
from megakor.parallel.layers import ShardedLayers
from megakor.parallel.loss import VocabularyShard, vocabulary_loss
from megakor.parallel.pipeline import GPTNeoXPipeline


@dataclass(frozen=True)
class Held:
    """How this rank's model holds one parameter.

    Attributes:
        spec: the parameter.
        shard: this rank's tensor shard of it.
        tied_elsewhere: whether another pipeline stage saves it (tied embeddings).
        saved_elsewhere: that, or another tensor rank saves it, since all of them hold it whole.
    """

    spec: ParameterSpec
    shard: Shard
    tied_elsewhere: bool = False
    saved_elsewhere: bool = False


@dataclass(frozen=True)
class Built:
    """A rank's model.

    Attributes:
        module: the whole model's part of this rank, or its pipeline stage; weights are not filled in.
        named: its parameters by canonical name.
        held: how it holds each of them.
        counter: what seeds its dropout.
        documents: what tells it the documents of its micro-batches.
        vocabulary: the columns of its logits.
    """

    module: nn.Module
    named: list[tuple[str, nn.Parameter]]
    held: dict[str, Held]
    counter: DropoutCounter
    documents: Documents
    vocabulary: VocabularyShard

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Those of `named` that are not frozen."""
        return [(name, parameter) for name, parameter in self.named if parameter.requires_grad]

    def loss(self, logits: torch.Tensor, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The scaled sum of losses, from this rank's logits and (labels, loss_mask, scale)."""
        return loss(logits, labels, shard=self.vocabulary)


def loss(logits: torch.Tensor, batch: tuple[torch.Tensor, ...], shard: VocabularyShard) -> torch.Tensor:
    """`vocabulary_loss` in the form that DeepSpeed's pipeline calls."""
    labels, loss_mask, scale = batch
    return vocabulary_loss(logits, labels, loss_mask, scale, shard)


def parts_of(
    config: EngineConfig, groups: Groups, dtype: torch.dtype, device: torch.device, attending: Attending = one_by_one
) -> Parts:
    """What this rank's model is made of."""
    dims = groups.dims
    data, context, tensor = (groups.position(axis) for axis in ("data", "context", "tensor"))
    part = data * dims.context + context
    heads = part * dims.tensor + tensor
    counter = DropoutCounter(
        config.train.seed,
        residual=heads if dims.sequence_parallel else part,
        heads=heads,
        devices=() if device.index is None else (device,),
    )
    return Parts(
        ShardedLayers(groups, dtype, device, gathered=config.parallel.zero_stage == 3),
        config.train.activation_checkpointing,
        config.train.activation_checkpointing_interval,
        counter,
        Documents(attending),
    )


def build(
    config: EngineConfig,
    model: ModelConfig,
    num_tokens: int,
    groups: Groups,
    dtype: torch.dtype,
    device: torch.device,
    loss_chunk: int,
    attending: Attending = one_by_one,
    lora: LoraConfig | None = None,
) -> Built:
    """This rank's part of the model; every rank calls.

    Args:
        model: the architecture, `vocab_size` resolved.
        num_tokens: the true vocabulary.
        dtype: of the weights in forward and backward passes.
        device: where to allocate them.
        loss_chunk: logits that the loss works through at a time.
        attending: attention within documents.
        lora: adapters to train in place of the parameters; None: all parameters are trained.

    Raises:
        ValueError: the tensor ranks cannot split the vocabulary, or a pipeline stage would have nothing to train.
    """
    dims = groups.dims
    assert model.vocab_size is not None
    if model.vocab_size % dims.tensor:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} must be divisible by parallel.tensor_parallel_size={dims.tensor}"
        )
    parts = parts_of(config, groups, dtype, device, attending)
    vocabulary = VocabularyShard.of(groups, model.vocab_size, num_tokens, loss_chunk)
    module: nn.Module
    if dims.pipeline > 1:
        module = GPTNeoXPipeline(
            model, parts, dims, config.parallel.pipeline_partition, partial(loss, shard=vocabulary)
        )
        if lora is not None:
            module.check_blocks()
            adapt(module, lora, parts.layers)
        named = list(module.canonical_parameters())
    else:
        module = GPTNeoXForCausalLM(model, parts)
        if lora is not None:
            adapt(module, lora, parts.layers)
        named = list(module.named_parameters())
    every = [*parameter_specs(model), *(adapter_specs(model, lora) if lora is not None else ())]
    specs, tensor = {spec.name: spec for spec in every}, groups.position("tensor")
    held = {}
    for name, parameter in named:
        shard = specs[name].shard(tensor, dims.tensor)
        parameter.model_parallel = shard.count > 1  # type: ignore[attr-defined]  # DeepSpeed's norms go by it
        tied_elsewhere = getattr(parameter, "ds_pipe_replicated", False)
        whole_elsewhere = shard.count == 1 and tensor > 0
        held[name] = Held(specs[name], shard, tied_elsewhere, tied_elsewhere or whole_elsewhere)
    return Built(module, named, held, parts.counter, parts.documents, vocabulary)
