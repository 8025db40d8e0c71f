"""Means of what training steps report, between two lines of the log."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hieratok.core.distributed import gather, process, total


class Meter:
    """Running means of what steps report, kept on the device: reading them at each step would stall a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.in_a_row = torch.zeros((), dtype=torch.long, device=self.device)
        self.first_bad = torch.zeros((), dtype=torch.long, device=self.device)
        self.start_interval()

    def start_interval(self) -> None:
        """Start new means."""
        self.sums: dict[str, Tensor] = {}  # (sum, number) of the finite values
        self.skipped_steps = torch.zeros((), dtype=torch.long, device=self.device)
        self.skipped_images = 0
        self.start_clock()

    def start_clock(self) -> None:
        """Start a new measurement of speed."""
        self.steps = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """The present interval, for a checkpoint; every process must call it.

        The sums of each process are kept apart: another order of addition would round differently.
        """
        return {
            "sums": gather({name: value.tolist() for name, value in self.sums.items()}) if self.sums else [],
            "skipped_images": gather(self.skipped_images),
            "skipped_steps": int(self.skipped_steps),
            "in_a_row": int(self.in_a_row),
            "first_bad": int(self.first_bad),
        }

    def resume(self, state: dict[str, Any] | None) -> None:
        """Continue the interval of a checkpoint; None: it has none.

        If the number of processes has changed, the first process takes all sums.
        """
        self.start_interval()
        if state is None:
            return
        rank, world = process()
        if len(state["skipped_images"]) == world:
            mine = slice(rank, rank + 1)
        else:
            mine = slice(None) if rank == 0 else slice(0)
        for sums in state["sums"][mine]:
            for name, values in sums.items():
                new = torch.tensor(values, device=self.device)
                self.sums[name] = self.sums[name] + new if name in self.sums else new
        self.skipped_images = sum(state["skipped_images"][mine])
        self.skipped_steps.fill_(state["skipped_steps"])
        self.in_a_row.fill_(state["in_a_row"])
        self.first_bad.fill_(state["first_bad"])

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add scalars by name; values that are not finite are left out of the means."""
        for name, value in terms.items():
            finite = torch.isfinite(value)
            new = torch.stack((torch.where(finite, value, 0).float(), finite.float()))
            self.sums[name] = self.sums[name] + new if name in self.sums else new

    def watch(self, norms: dict[str, Tensor], step: int, tolerated: Tensor) -> Tensor:
        """Add a step's gradient norms by network; returns 1 if one is not finite (as for a bad loss), else 0.

        It is the same on every process: after the gradients' all-reduce, a bad value is bad everywhere.

        Args:
            norms: scalars.
            step: its number, from 1.
            tolerated: a boolean scalar: whether a bad step does not count as divergence. It is skipped in any case.
        """
        bad = ~torch.stack([torch.isfinite(norm) for norm in norms.values()]).all()
        first, *others = norms
        self.add({"gradient_norm": norms[first], **{f"{name}/gradient_norm": norms[name] for name in others}})
        telling = bad & ~tolerated
        self.first_bad = torch.where(telling & (self.in_a_row == 0), step, self.first_bad)
        self.in_a_row = torch.where(telling, self.in_a_row + 1, 0)
        self.skipped_steps += bad
        self.steps += 1
        return bad.float()

    def bad_steps(self) -> tuple[int, int]:
        """The number of bad steps in a row up to now, and the first of them. Waits for the device."""
        return int(self.in_a_row), int(self.first_bad)

    def flush(self, batch_size: int) -> tuple[dict[str, float], dict[str, int]]:
        """Means over the interval and over processes, with the rate, and counts of skips; starts a new interval."""
        sums = total(torch.stack(list(self.sums.values()))).tolist()
        skipped = total(torch.tensor(self.skipped_images, device=self.device))
        seconds = time.perf_counter() - self.started
        means = {name: value / count for name, (value, count) in zip(self.sums, sums) if count}
        means |= {"images_per_second": self.steps * batch_size / seconds, "data_wait": self.waited / seconds}
        counts = {"bad_images": int(skipped), "skipped_steps": int(self.skipped_steps)}
        self.start_interval()
        return means, counts
