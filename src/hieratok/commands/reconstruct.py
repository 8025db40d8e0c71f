"""`hieratok reconstruct`."""

from dataclasses import dataclass

from hieratok.settings import command


@dataclass(kw_only=True)
class Reconstruct:
    """Encode and decode photos: every scale as PNG, and one contact sheet.

    Example: hieratok reconstruct runs/quickstart photos/ --out reconstructions
    """

    run: str
    """Run folder, tokenizer folder or hub id."""
    images: list[str]
    """Image files, folders or patterns."""
    out: str
    """Folder to write to."""
    crop: bool = False
    """Cut images to the tokenizer's size first, as evaluation does."""
    device: str | None = None
    """Where to compute, such as cuda:0 or cpu. Default: the GPU if there is one."""


def run(options: Reconstruct) -> None:
    """The command."""
    from hieratok.core.devices import best_device
    from hieratok.tasks.reconstruct import reconstruct
    from hieratok.tokenizer.model import HieraTok

    tokenizer = HieraTok.from_pretrained(options.run)
    done = reconstruct(tokenizer, options.images, options.out, options.device or best_device(), options.crop)
    print(done.summary())


COMMAND = command("reconstruct", Reconstruct, run, "run", "images")
