"""Timing calls in turns in one process: medians, ratios with their spread, and peak memory."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hieratok.core.progress import progress

Call = Callable[[], object]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MATRIX_SIDE = {"cuda": 8192, "cpu": 2048, "mps": 4096}
SHORTEST = 0.03
"""Shortest sample in seconds: shorter calls are repeated."""
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28, "mps": 2**28}


class Ratio(NamedTuple):
    """A ratio of times: the median over rounds, and the lowest and highest round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Times:
    """Seconds of several calls, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> Ratio:
        """The time of `name` divided by that of `to`, round by round: disturbances affect both."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def take_turns(
    calls: Mapping[str, Call], device: torch.device, rounds: int, warm_up: int = 1, title: str | None = None
) -> Times:
    """Time calls in turns: every round has a sample of each, every second round in the opposite order.

    Args:
        calls: by name.
        device: synchronised before and after a sample.
        rounds: samples of each; a short call is repeated in a sample.
        warm_up: rounds of single calls before, for compilation and caches.
        title: of the progress bar; None: no bar.
    """
    repeats = dict.fromkeys(calls, 1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    total = len(calls) * (warm_up + rounds)
    with progress(total=total, title=title or "", unit="samples", leave=False, hide=title is None) as bar:
        for _ in range(warm_up):
            for name, call in calls.items():
                repeats[name] = max(1, math.ceil(SHORTEST / _sample(call, 1, device)))
                bar.update()
        for i in range(rounds):
            for name in names if i % 2 == 0 else reversed(names):
                seconds[name].append(_sample(calls[name], repeats[name], device))
                bar.update()
    return Times(seconds)


def _sample(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Call, float]:
    """A large square matrix product, a practical limit of the machine's rate, and its FLOPs."""
    side = MATRIX_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * side**3


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda: target.copy_(source)}, device, rounds=5)
    return 2 * source.nbytes / times.median("copy")


def count_flops(call: Call) -> float:
    """FLOPs of one call, two per multiply-add: matrix products, convolutions and attention, backward ones too."""
    aten = torch.ops.aten
    cpu_attention = {  # unknown to the counter
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
        ),
    }
    # The counter cannot see inside a compiled graph.
    counting = FlopCounterMode(display=False, custom_mapping=cpu_attention)
    with torch.compiler.set_stance("force_eager"), counting:
        call()
    return float(counting.get_total_flops())


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Peak bytes of a call beyond those allocated before it; None if not known.

    On a GPU from torch's allocator; on Linux from the process's resident memory, after free memory was returned.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not CLEAR.exists():
        return None
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        CLEAR.write_text("5")  # resets the peak to the present resident memory
    except OSError:  # another C library, or no permission
        return None
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
