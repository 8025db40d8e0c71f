"""The device that this machine computes on."""

import os
import platform
from pathlib import Path

import torch


def best_device() -> torch.device:
    """A GPU if there is one, else the CPU; each of several processes gets its own GPU.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if index >= count:
        raise ValueError(
            f"more processes than GPUs on this machine ({count}): start {count}, or hide the GPUs to train on the CPU"
        )
    return torch.device(accelerator.type, index)


def hardware() -> str:
    """What a run trains on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"
