"""Options of `hieratok export`. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class Export:
    """Write a tokenizer as ONNX or torch.export files: encoder, decoder, and a decoder for each prefix of the scales.

    Each file is run and compared with the original when it is written.

    Example: hieratok export runs/photos --int8 --data photos/val
    """

    run: str
    """Run folder, tokenizer folder or hub id."""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx: for ONNX Runtime and other readers of ONNX. torch: for `torch.export.load`."""
    int8: bool = False
    """Write every ONNX file with int8 weights too, and print the cost in PSNR on --data."""
    data: str = "bundled:val"
    """Images for checking files and measuring PSNR: a folder, a pattern or WebDataset shards."""
    out: str | None = None
    """Folder to write to; an earlier export there is replaced. Default: `export-onnx` or `export-torch` in RUN."""

    def __post_init__(self):
        if self.int8 and self.format != "onnx":
            raise ValueError("--int8 is for ONNX files: leave --format torch out")
