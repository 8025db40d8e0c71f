"""hieratok in other people's tools: classes for diffusers, models on the Hugging Face hub, files for other runtimes.

The classes for diffusers are names of this package, `from hieratok.interop import AutoencoderHieraTok`, and saved
pipelines call them so. They are imported on first use: diffusers takes a while.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hieratok.interop.diffusers import AutoencoderHieraTok, HieraTokDiT, HieraTokPipeline
    from hieratok.interop.preview import HieraTokPreview

__all__ = ["AutoencoderHieraTok", "HieraTokDiT", "HieraTokPipeline", "HieraTokPreview"]


def __getattr__(name: str) -> Any:
    """The classes for diffusers."""
    if name == "HieraTokPreview":
        from hieratok.interop.preview import HieraTokPreview

        return HieraTokPreview
    if name in __all__ or name == "ModelMixin":  # diffusers looks for a class's base class in the class's own module
        from hieratok.interop import diffusers

        return getattr(diffusers, name)
    raise AttributeError(f"module 'hieratok.interop' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted({*globals(), *__all__})
