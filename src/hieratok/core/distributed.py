"""The processes of one job, as `torchrun` or `accelerate launch` starts them: the only place that knows about them."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hieratok.core.devices import best_device


class Mergeable(Protocol):
    """A metric whose parts, one a process, can be put together."""

    def state(self) -> Any: ...

    def merge_state(self, state: Any, /) -> None: ...


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes of this job, if not done yet, and leaves the group when all have finished.

    gloo's threads may abort a process that the others left earlier. After an error nothing is done: leaving
    would wait for operations that the others have not begun, and the process is about to end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    device = best_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield
    dist.barrier()
    dist.destroy_process_group()


def check_joined() -> None:
    """Raise ValueError if this job has several processes that have not joined: each would do the whole work."""
    if process()[1] != int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError("several processes were started: call this inside hieratok.core.distributed.process_group()")


def process() -> tuple[int, int]:
    """This process's index and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this is the first process, or the only one; known before the processes have joined, too."""
    return process()[0] == 0 and os.environ.get("RANK", "0") == "0"


def wait() -> None:
    """Until all processes are here, so that what the first one wrote can be read."""
    if process()[1] > 1:
        dist.barrier()


def broadcast(value: Any) -> Any:
    """The first process's value, on every process."""
    values = [value]
    if process()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def total(value: Tensor) -> Tensor:
    """The sum over processes, on every process; the given tensor is left as it is."""
    if process()[1] == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def gather(value: Any) -> list[Any]:
    """Every process's value, in their order, on every process."""
    _, world = process()
    values = [value]
    if world > 1:
        values = [None] * world
        dist.all_gather_object(values, value)
    return values


def merge_processes(metric: Mergeable) -> None:
    """Merge what the processes collected; each then holds everything. With one process, nothing is done."""
    rank, world = process()
    if world > 1:
        for other, state in enumerate(gather(metric.state())):
            if other != rank:
                metric.merge_state(state)
