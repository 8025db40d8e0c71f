"""`hieratok latents`: write the latents of a set of images once, so that training generators need not encode."""

import shlex
from pathlib import Path

from hieratok.core import checkpoint
from hieratok.core.devices import best_device
from hieratok.core.distributed import process, process_group, wait
from hieratok.core.lock import lock
from hieratok.data import latent_writer
from hieratok.data.config import WriteLatents
from hieratok.data.images import Source, open_source
from hieratok.data.latents import Manifest
from hieratok.studies import recipes
from hieratok.tokenizer.model import HieraTok
from hieratok.tokenizer.pretrained import Tokenizer, describe_tokenizer, load_tokenizer
from hieratok.training.config import GeneratorRun
from hieratok.training.generator import fitting
from hieratok.training.tokenizer import measure_latents


def write_latents(options: WriteLatents) -> None:
    """The command `hieratok latents`.

    Raises:
        FileNotFoundError, ValueError: no such run or images, an unreadable image, latents of something else in `out`,
            or another process that writes there.
    """
    with process_group():
        tokenizer = load_tokenizer(options.run, options.device or best_device(), image_size=options.size)
        source = open_source(options.data)
        if options.out is None:
            store_statistics(tokenizer, source, options.run)
            return
        out = Path(options.out)
        size = tokenizer.config.image_size
        before = describe(tokenizer, source, options)
        manifest = latent_writer.write(out, tokenizer, source, size, before, options.batch_size)
        if process()[0] == 0:
            d, h, w = manifest.shape
            print(f"{manifest.images:,} latents, {d} x {h} x {w}, and those of the mirror images: {out}")
            print(next_command(source, options.run, out, manifest.shape))


def next_command(source: Source, run: str, out: Path, shape: tuple[int, int, int]) -> str:
    """The command that trains a generator on these latents, or why none can be trained."""
    recipe = recipes.get("dit-tiny")
    assert isinstance(recipe, GeneratorRun)
    try:
        changes = fitting(recipe.model, str(out), shape, [source.label(i) for i in range(len(source))])
    except ValueError as error:
        return f"no generator can be trained on them: {error}"
    words = ["hieratok", "train", recipe.name, "--tokenizer", run, "--data", str(out), *changes]
    return f"next: {shlex.join(words)}"


def describe(tokenizer: Tokenizer, source: Source, options: WriteLatents) -> Manifest:
    """The manifest of latents to write."""
    sha256, config = describe_tokenizer(options.run)
    facts = {
        "source": options.run,
        "sha256": sha256,
        "encoder_sha256": tokenizer.encoder_sha256,
        "config": config,
    }
    shape = (tokenizer.config.latent_channels, *tokenizer.config.grid)
    return latent_writer.describe(facts, source, options.data, tokenizer.config.image_size, shape)


def store_statistics(tokenizer: Tokenizer, source: Source, run: str) -> None:
    """Measure the latents' mean and deviation over all images and store them in the tokenizer's files.

    Raises:
        ValueError: the tokenizer cannot be written to: on the hub, a checkpoint, or of diffusers.
    """
    if not isinstance(tokenizer, HieraTok):
        raise ValueError(
            f"--stats-only is for our tokenizers: latents of {run} have their own statistics, use --out DIR"
        )
    if not Path(run).is_dir():
        raise ValueError(f"--stats-only writes into the tokenizer's folder, and {run} is not one")
    folder = checkpoint.find(run)
    if folder.parent.parent.name == "checkpoints":
        raise ValueError(f"{run} holds no finished tokenizer yet: its training measures the statistics when it ends")
    with lock(folder.parent if folder.name == "tokenizer" else folder, "latents"):  # the run's lock
        measure_latents(tokenizer, source, tokenizer.config.image_size)
        if process()[0] == 0:
            for name in (checkpoint.WEIGHTS, checkpoint.CONFIG):
                checkpoint.remove_leftovers(folder / name)
            tokenizer.save_pretrained(folder)
            channels = tokenizer.config.latent_channels
            print(f"mean and deviation of {channels} channels over {len(source):,} images: {folder}")
        wait()
