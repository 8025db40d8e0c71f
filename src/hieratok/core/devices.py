"""What this machine computes on."""

import os
import platform
from pathlib import Path

import torch


def best_device() -> torch.device:
    """A GPU if there is one; of several, under `torchrun`, each process its own."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0))) if accelerator else torch.device("cpu")


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
