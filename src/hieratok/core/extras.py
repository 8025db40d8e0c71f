"""Optional packages, and the extra that installs each."""

import contextlib
from collections.abc import Iterator

EXTRAS = {
    "aiohttp": "data",
    "diffusers": "diffusers",
    "filelock": "data",
    "fsspec": "data",
    "gcsfs": "data",
    "gradio": "app",
    "lpips": "eval",
    "matplotlib": "eval",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "pyarrow": "data",
    "s3fs": "data",
    "scipy": "eval",
    "skimage": "train",
    "sklearn": "eval",
    "tensorboard": "train",
    "timm": "eval",
    "wandb": "wandb",
}
"""Import name of a package: an extra that installs it."""


class MissingPackageError(ImportError, ValueError):
    """An optional package is not installed; the message has the command that installs it.

    It is a ValueError too: the command line then reports it as a user's mistake.
    """

    def __init__(self, package: str):
        super().__init__(f"{package} is not installed: pip install 'hieratok[{EXTRAS[package]}]'")


@contextlib.contextmanager
def needs_extras() -> Iterator[None]:
    """Wraps imports: names what to install if one of `EXTRAS` is missing.

    Raises:
        MissingPackageError: one is. Other errors of imports stay as they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingPackageError(package) from error
