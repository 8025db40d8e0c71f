"""Mixed precision: one name for it in all settings, and what it means."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # settings are read without torch
    import torch

Precision = Literal["fp32", "bf16"]


def autocast(device: "torch.device", precision: Precision) -> "torch.autocast":
    """A context in which matrix products and convolutions are computed in this precision; weights stay float32."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
