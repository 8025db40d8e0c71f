"""Mixed precision."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # settings are read without torch
    import torch

Precision = Literal["fp32", "bf16", "fp16"]


def dtype_of(precision: Precision) -> "torch.dtype":
    """The type that matrix products and convolutions are computed in."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device: "torch.device", precision: Precision) -> "torch.autocast":
    """A context in which matrix products and convolutions are computed in this precision; weights stay float32."""
    import torch

    is_mixed = precision != "fp32"
    return torch.autocast(device.type, dtype_of(precision) if is_mixed else torch.bfloat16, enabled=is_mixed)
