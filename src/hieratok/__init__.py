"""hieratok: the multi-scale visual tokenizer of HieraTok (arXiv 2509.23736).

from hieratok import HieraTok
tok = HieraTok.from_pretrained("runs/quickstart")
z = tok.encode(images).mode()
pyramid = tok.decode_pyramid(z)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hieratok.interop.hub import push_to_hub
    from hieratok.tokenizer.config import TokenizerConfig
    from hieratok.tokenizer.model import HieraTok
    from hieratok.tokenizer.posterior import DiagonalGaussian

__version__ = "0.1.0"
__all__ = ["DiagonalGaussian", "HieraTok", "TokenizerConfig", "push_to_hub"]

_HOME = {
    "HieraTok": "hieratok.tokenizer.model",
    "TokenizerConfig": "hieratok.tokenizer.config",
    "DiagonalGaussian": "hieratok.tokenizer.posterior",
    "push_to_hub": "hieratok.interop.hub",
}


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: `hieratok --help` must not wait for torch."""
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hieratok' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted({*globals(), *__all__})
