"""Parameters cut into shards and pieces over ranks, and twenty steps of our Adafactor over them."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megakor.model.specs import WHOLE, Shard
from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import Groups
from megakor.train.adafactor import Adafactor, Sharing
from megakor.train.fragments import Flat, Fragment

SHAPES = {"a": (7, 5), "b": (11,), "c": (4, 9), "d": (1, 6), "e": (6, 1), "f": (3,), "g": (16, 16), "h": (1,),
          "i": (8,)}  # fmt: skip
SHAPES = {name: torch.Size(shape) for name, shape in SHAPES.items()}
NUM_STEPS = 20
WEIGHT_DECAY = 0.1


def starts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Gradients whose size moves by orders, so that updates are clipped in some steps; a row is always zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    scale = 10.0 ** (step % 5 - 3)
    found = {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}
    found["a"][3] = 0.0
    return found


def rate(step: int) -> float:
    return 1e-2 * (1.0 - step / 40)


@dataclass(frozen=True)
class Cut:
    """A piece of a parameter, or of a shard of it, on a rank."""

    rank: int
    name: str
    offset: int
    numel: int
    shard: Shard = WHOLE

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        return self.shard.of(whole).flatten()[self.offset : self.offset + self.numel]


def random_cuts(world_size: int, seed: int) -> list[Cut]:
    """Every parameter in pieces of any length, in any order of ranks; a rank holds one of them or none."""
    rng, cuts = random.Random(seed), []
    for name, shape in SHAPES.items():
        size = shape.numel()
        borders = sorted({0, size, *(rng.randint(0, size) for _ in range(rng.randrange(world_size)))})
        ranks = rng.sample(range(world_size), len(borders) - 1)
        cuts += [Cut(rank, name, a, b - a) for rank, a, b in zip(ranks, borders, borders[1:], strict=False)]
    rng.shuffle(cuts)
    return cuts


def sharded_cuts(tensor: int, replicas: int, seed: int) -> list[Cut]:
    """Shards over tensor ranks where a parameter can be split, wholes elsewhere; each cut at random over its replicas.

    Ranks are numbered as in a layout: tensor ranks are neighbours.
    """
    rng, cuts = random.Random(seed), []
    dims = {name: [dim for dim, size in enumerate(shape) if size % tensor == 0] for name, shape in SHAPES.items()}
    chosen = {name: rng.choice(found) if found else None for name, found in dims.items()}
    for index in range(tensor):
        for name, shape in SHAPES.items():
            dim = chosen[name]
            shard = WHOLE if dim is None else Shard(dim, index, tensor)
            size = math.prod(shard.shape(shape))
            borders = sorted({0, size, *(rng.randint(0, size) for _ in range(rng.randrange(replicas)))})
            ranks = rng.sample(range(replicas), len(borders) - 1)
            for replica, (start, stop) in zip(ranks, itertools.pairwise(borders), strict=True):
                cuts.append(Cut(replica * tensor + index, name, start, stop - start, shard))
    rng.shuffle(cuts)
    return cuts


def zero_cuts(world_size: int) -> list[Cut]:
    """As ZeRO does: all parameters end to end, in equal shares."""
    total = sum(shape.numel() for shape in SHAPES.values())
    share, position, cuts = -(-total // world_size), 0, []
    for name, shape in SHAPES.items():
        done = 0
        while done < shape.numel():
            rank = (position + done) // share
            numel = min(shape.numel() - done, (rank + 1) * share - position - done)
            cuts.append(Cut(rank, name, done, numel))
            done += numel
        position += shape.numel()
    return cuts


def train(
    cuts: list[Cut], rank: int, replicas: dist.ProcessGroup | None, tensor: dist.ProcessGroup | None = None
) -> list[tuple[Cut, torch.Tensor]]:
    """Twenty steps over this rank's pieces; returns the pieces' weights."""
    own = [cut for cut in cuts if cut.rank == rank]
    values, fragments, groups = starts(), [], []
    for decays in (True, False):
        members = [cut for cut in own if (len(SHAPES[cut.name]) > 1) is decays]
        flat = torch.cat([torch.zeros(0), *(cut.of(values[cut.name]) for cut in members)])
        parameter = torch.nn.Parameter(flat)
        start = 0
        for cut in members:
            shape = torch.Size(cut.shard.shape(SHAPES[cut.name]))
            fragments.append(Fragment(cut.name, shape, cut.offset, parameter, start, cut.numel, True))
            start += cut.numel
        # As with DeepSpeed, every rank has every group; a rank that owns nothing of one has an empty flat tensor.
        names = [name for name, shape in SHAPES.items() if (len(shape) > 1) is decays]
        groups.append({"params": [parameter], "names": names, "weight_decay": WEIGHT_DECAY if decays else 0.0})
    optimizer = Adafactor(groups, lr=0.0)
    tensors = [Flat(param_group["params"][0], param_group["names"]) for param_group in groups]
    shards = {cut.name: cut.shard for cut in own}
    optimizer.attach(fragments, tensors, 0, Sharing(SHAPES, shards, replicas, tensor))
    for step in range(NUM_STEPS):
        whole = gradients(step)
        for param_group in optimizer.param_groups:
            param_group["lr"] = rate(step)
            for parameter in param_group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        for fragment in fragments:
            part = shards[fragment.name].of(whole[fragment.name]).flatten()
            piece = part[fragment.offset : fragment.offset + fragment.numel]
            fragment.of(fragment.flat.grad).copy_(piece)  # type: ignore[arg-type]
        optimizer.step()
    return [(Cut(rank, f.name, f.offset, f.numel, shards[f.name]), f.of(f.flat.data).clone()) for f in fragments]


def train_all(variants: list[list[Cut]]) -> list[list[tuple[Cut, torch.Tensor]]]:
    return [train(cuts, dist.get_rank(), dist.group.WORLD) for cuts in variants]


def train_sharded(tensor: int, variants: list[list[Cut]]) -> list[list[tuple[Cut, torch.Tensor]]]:
    """The same with tensor ranks; the other ranks are replicas."""
    groups = Groups.create(ParallelDims(1, dist.get_world_size() // tensor, 1, tensor))
    return [train(cuts, dist.get_rank(), groups.replicas, groups.tensor) for cuts in variants]


def together(parts: list[list[tuple[Cut, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    result = {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}
    for cut, values in (entry for part in parts for entry in part):
        part = cut.shard.of(result[cut.name])
        flat = part.flatten().clone()
        flat[cut.offset : cut.offset + cut.numel] = values
        part.copy_(flat.view(part.shape))
    return result


def whole_cuts() -> list[Cut]:
    return [Cut(0, name, 0, shape.numel()) for name, shape in SHAPES.items()]
