"""The device that a rank computes on: the one place that asks what the machine has.

DeepSpeed's accelerator abstraction names the device; nothing else in megakor does.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator

from megakor.config.schema import Precision
from megakor.model.documents import Attending, all_at_once, one_by_one
from megakor.parallel.chunks import ACCELERATOR_LOSS_CHUNK, HOST_LOSS_CHUNK

HOST = "cpu"
"""DeepSpeed's name of where offloaded state is kept."""

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
"""What mpirun of Open MPI calls what other launchers tell a rank."""


def device() -> torch.device:
    """This rank's device."""
    return torch.device(get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", "0"))))


def is_cpu() -> bool:
    return device().type == "cpu"


def loss_chunk() -> int:
    """Logits that the loss works through at a time on this rank's device."""
    return HOST_LOSS_CHUNK if is_cpu() else ACCELERATOR_LOSS_CHUNK


def attending(precision: Precision, compiled: bool = False) -> Attending:
    """How this rank's device attends within documents: by FlashAttention where it has it, in half precision.

    Args:
        precision: of queries, keys and values.
        compiled: whether the blocks that attend are.
    """
    alone = torch.compiler.disable(one_by_one) if compiled else one_by_one
    if device().type != "cuda" or precision is Precision.fp32 or torch.__version__ < (2, 13):  # type: ignore[operator]
        return alone
    if torch.get_device_module(device()).get_device_capability() < (8, 0):
        return alone
    return partial(all_at_once, otherwise=alone) if compiled else all_at_once


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor on this rank's device; accelerators copy from pinned memory beside the computation."""
    return tensor if is_cpu() else get_accelerator().pin_memory(tensor).to(device(), non_blocking=True)


def check_precision(precision: Precision) -> None:
    """Raise where this device cannot train in a precision."""
    if precision is Precision.fp16 and is_cpu():
        raise ValueError(
            "train.precision=fp16 must be bf16 or fp32 on a CPU: DeepSpeed has no loss-scaled fp16 training there"
        )
    if precision is Precision.bf16 and not get_accelerator().is_bf16_supported():
        raise ValueError("train.precision=bf16 must be fp16 or fp32 on this device: it has no bf16 arithmetic")


def local_world_size() -> int:
    """Ranks of this node, as the launcher says; where it does not, all ranks."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))


def num_slots(wanted: int | None) -> int:
    """Ranks that this machine has room for: one for each accelerator; on a CPU as many as are wanted, or one."""
    return (wanted or 1) if is_cpu() else get_accelerator().device_count()


def num_devices() -> int:
    """Accelerators that this process sees; 0 on a CPU."""
    return 0 if is_cpu() else get_accelerator().device_count()


def device_name() -> str:
    """What this rank's device is called, such as `NVIDIA H100 80GB HBM3`; on a CPU its number of cores."""
    if is_cpu():
        return f"{len(os.sched_getaffinity(0))} cores"
    return torch.get_device_module(device()).get_device_name(device())


def device_memory() -> tuple[int, int]:
    """Bytes of this rank's device, free and in all; on a CPU the host's."""
    index = None if is_cpu() else device().index
    return get_accelerator().available_memory(index), get_accelerator().total_memory(index)


def communication_library() -> str:
    """What collectives run on, with its version where it has one of its own, such as `nccl 2.27.3`."""
    if is_cpu():
        return "gloo"
    backend = get_accelerator().communication_backend_name()
    module = getattr(torch.get_device_module(device()), backend, None)
    return f"{backend} {'.'.join(map(str, module.version()))}" if module is not None else backend


def take_place() -> bool:
    """Set what a launcher sets where there is none, by one name for all; whether this process stands alone."""
    for name, theirs in OPEN_MPI.items():
        if theirs in os.environ:
            os.environ.setdefault(name, os.environ[theirs])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    return os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ


def start_process_group(timeout_minutes: float = 30.0) -> None:
    """Join the run's process group; every rank calls. Without a launcher the process is a group of one.

    On CPUs the ranks of a node share its cores, unless OMP_NUM_THREADS says otherwise.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    alone = take_place()
    if is_cpu() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size()))
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if is_cpu():
        # DeepSpeed would compile a shared-memory all-reduce for minutes at the first start, and only where there is a
        # C++ compiler; gloo reduces without it, and the same on every machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if is_cpu() else get_accelerator().communication_backend_name()
    timeout = timedelta(minutes=timeout_minutes)
    if alone:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, `torch.compile` gives functions back as they are.

    DeepSpeed 0.19 has the kernels of an optimizer that is not used here compiled whenever an engine is made, which
    loads the compiler for seconds on every rank.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read at every call
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def start_fake_process_group(rank: int, world_size: int) -> None:
    """Stand as one rank of a group whose other ranks do not exist: its collectives return at once and move nothing.

    For fake tensors. They are the host's on every machine, so that what is found out with them is the same on all:
    this process computes on the host from now on.
    """
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not is_cpu():
        set_accelerator(CPU_Accelerator())
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)


def end_process_group() -> None:
    """Leave the process group cleanly; every rank calls."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_device() -> None:
    """Return when this rank's device has done what it was given; at once on a CPU."""
    get_accelerator().synchronize()


def fastest(work: Callable[[], object], seconds: float) -> float:
    """Seconds that work takes on this rank's device: the least of as many times as fit into `seconds`, at least one."""
    best, deadline = float("inf"), time.perf_counter() + seconds
    wait_for_device()
    while True:
        start = time.perf_counter()
        work()
        wait_for_device()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() >= deadline:
            return best


def matmul_tflops(precision: Precision, seconds: float = 1.0, size: int = 768) -> float:
    """This rank's matmul rate, TFLOP/s.

    The best of square matmuls of `size` on CPUs and 8 × `size` elsewhere, in the run's arithmetic.
    """
    side = size if is_cpu() else 8 * size
    left = torch.randn(side, side, device=device(), dtype=DTYPES[precision])
    right = torch.randn(side, side, device=device(), dtype=DTYPES[precision])
    return 2.0 * side**3 / fastest(lambda: left @ right, seconds) / 1e12


def attention_tflops(precision: Precision, heads: int, length: int, head_dim: int, seconds: float = 0.5) -> float:
    """This rank's rate in causal attention of one sequence, forward and backward, the masked half not counted."""
    shape = (1, heads, length, head_dim)
    query, key, value = (
        torch.randn(shape, device=device(), dtype=DTYPES[precision], requires_grad=True) for _ in range(3)
    )
    gradient = torch.ones(shape, device=device(), dtype=DTYPES[precision])

    def both() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).backward(gradient)

    # Two products forward and five backward, each of length² / 2 · head_dim multiplications and additions a head.
    return 7.0 * heads * length**2 * head_dim / fastest(both, seconds) / 1e12


def copy_gb_per_s(seconds: float = 0.5, num_bytes: int = 2**26) -> tuple[float, float, float]:
    """GB/s of this rank's device memory (read and written), of the link from the host to it, and of the host's memory.

    On a CPU the three are one.
    """
    host = [torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2)]
    in_host = 2 * num_bytes / fastest(lambda: host[1].copy_(host[0]), seconds) / 1e9
    if is_cpu():
        return in_host, in_host, in_host
    there = [torch.ones(num_bytes, dtype=torch.uint8, device=device()) for _ in range(2)]
    pinned = get_accelerator().pin_memory(host[0])
    link = num_bytes / fastest(lambda: there[0].copy_(pinned, non_blocking=True), seconds) / 1e9
    return 2 * num_bytes / fastest(lambda: there[1].copy_(there[0]), seconds) / 1e9, link, in_host


def measure_peak_tflops(precision: Precision, seconds: float = 1.0, size: int = 768) -> float:
    """Matmul rate of all ranks together, TFLOP/s; every rank calls, and all measure at once. As `matmul_tflops`."""
    dist.barrier()
    rate = torch.tensor([matmul_tflops(precision, seconds, size)], device=device())
    dist.all_reduce(rate)
    return rate.item()
