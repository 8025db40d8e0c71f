"""Metrics over several processes: each sees its share of the images, then all put together what they collected."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch.distributed as dist


class Mergeable(Protocol):
    """A metric whose parts, one a process, can be put together."""

    def state(self) -> Any: ...

    def merge_state(self, state: Any, /) -> None: ...


def merge_processes(metric: Mergeable) -> None:
    """Put together what the processes collected; each then holds everything. Nothing happens with one process."""
    rank, world = process()
    if world > 1:
        states: list[Any] = [None] * world
        dist.all_gather_object(states, metric.state())
        for other, state in enumerate(states):
            if other != rank:
                metric.merge_state(state)


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


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that `torchrun` started, unless that has been done."""
    with leaving_processes():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        yield


@contextlib.contextmanager
def leaving_processes() -> Iterator[None]:
    """Leaves the process group that the block joins, if it does, when all processes have come to its end: one that
    the others left earlier may be aborted by gloo's threads. A group that was joined before stays.

    After an error nothing is done: `destroy_process_group` would wait for operations that the others have not begun,
    and the process is about to end.
    """
    was_joined = dist.is_available() and dist.is_initialized()
    yield
    if not was_joined and dist.is_available() and dist.is_initialized():
        wait()
        dist.destroy_process_group()
