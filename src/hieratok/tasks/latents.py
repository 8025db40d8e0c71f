"""`hieratok latents`: write the latents of a set of images once, so that training generators need not encode.

Every shard is written atomically, and checked by its checksums before it counts as done, so the same command resumes.
Under `torchrun` the shards are divided among the processes.
"""

import logging
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hieratok.core import checkpoint
from hieratok.core.devices import best_device
from hieratok.core.distributed import process, process_group, wait
from hieratok.core.lock import lock
from hieratok.core.progress import progress
from hieratok.data.config import WriteLatents
from hieratok.data.images import Source, Subset, evaluation_batches, names_sha256, open_source, to_float
from hieratok.data.latents import MANIFEST, LatentStatistics, Manifest, read_shard, shard_folder, whose
from hieratok.evaluation.features import tensors_sha256
from hieratok.studies import recipes
from hieratok.tokenizer.model import HieraTok
from hieratok.tokenizer.pretrained import Tokenizer, describe_tokenizer, load_tokenizer
from hieratok.training.config import GeneratorRun
from hieratok.training.generator import fitting
from hieratok.training.tokenizer import measure_latents

logger = logging.getLogger(__name__)

SHARD_IMAGES = 2_048
FILES = [f"{name}.npy" for name in ("mean", "logvar", "labels", "names", "moments")]
"""Size of a shard in bytes."""


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
        with lock(out, "latents"):
            manifest = start(out, describe(tokenizer, source, options))
            write_shards(tokenizer, source, manifest, out, options.batch_size)
            wait()
            if process()[0] == 0:
                write_manifest(out, with_statistics(manifest, out))
                d, h, w = manifest.shape
                print(f"{manifest.images:,} latents, {d} x {h} x {w}, and those of the mirror images: {out}")
                print(next_command(source, options.run, out, manifest.shape))
            wait()


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
    side = tokenizer.config.image_size
    sha256, config = describe_tokenizer(options.run)
    return Manifest(
        tokenizer={
            "source": options.run,
            "sha256": sha256,
            "encoder_sha256": tensors_sha256(tokenizer.encoder),
            "config": config,
        },
        data={"path": options.data, "crop": f"ADM centre crop to {side}", "names_sha256": names_sha256(source)},
        images=len(source),
        shape=(tokenizer.config.latent_channels, *tokenizer.config.grid),
        shard_images=SHARD_IMAGES,
    )


def start(out: Path, manifest: Manifest) -> Manifest:
    """Begin a folder, or resume it if the tokenizer and the images are the same; every process must call it.

    Raises:
        ValueError: it holds other latents, or a damaged manifest.
    """
    if (out / MANIFEST).is_file():
        try:
            before = Manifest.read(out)
        except ValueError as error:
            raise ValueError(
                f"{error}: remove {MANIFEST}, and the same command makes it and what else is missing"
            ) from error
        if before.tokenizer["encoder_sha256"] != manifest.tokenizer["encoder_sha256"]:
            others = whose(before.tokenizer["source"], manifest.tokenizer["source"])
            raise ValueError(f"{out} holds latents of {others}: choose another --out, or remove the folder")
        if (before.data["names_sha256"], before.data["crop"]) != (manifest.data["names_sha256"], manifest.data["crop"]):
            raise ValueError(f"{out} holds latents of other images, {before.data['path']}: choose another --out")
        manifest = replace(manifest, shard_images=before.shard_images)  # the rest is equal, or was changed since
    wait()
    if process()[0] == 0:
        for name in (MANIFEST, "shard-*"):
            checkpoint.remove_leftovers(out / name)
        write_manifest(out, manifest)
    wait()
    return manifest


def write_manifest(out: Path, manifest: Manifest) -> None:
    """Write the manifest atomically."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(out / MANIFEST, asdict(manifest))


def write_shards(tokenizer: Tokenizer, source: Source, manifest: Manifest, out: Path, batch_size: int) -> None:
    """Write this process's share of the shards, except intact ones."""
    rank, world = process()
    mine = [k for k in range(len(manifest))[rank::world] if not is_whole(out, k, manifest)]
    everything = range(len(source))
    parts = {k: Subset(source, everything[k * manifest.shard_images :][: manifest.shard_images]) for k in mine}
    with progress(total=sum(map(len, parts.values())), unit="images", title="latents") as bar:
        for shard, part in parts.items():
            statistics = LatentStatistics(manifest.shape[0])
            means, logvars, labels, names = [], [], [], []
            for batch_names, mean, logvar, batch_labels in encoded(tokenizer, part, batch_size):
                statistics.update(mean.flatten(0, 1), logvar.flatten(0, 1))
                means.append(mean)
                logvars.append(logvar)
                labels.append(batch_labels)
                names += batch_names
                bar.update(len(mean))
            with checkpoint.atomic_folder(shard_folder(out, shard)) as folder:
                np.save(folder / "mean.npy", torch.cat(means).numpy())
                np.save(folder / "logvar.npy", torch.cat(logvars).numpy())
                np.save(folder / "labels.npy", torch.cat(labels).numpy())
                np.save(folder / "names.npy", np.array([name.encode(errors="surrogateescape") for name in names]))
                np.save(folder / "moments.npy", statistics.sums.numpy())
                checkpoint.seal(folder, **belongs_to(manifest, shard))


def belongs_to(manifest: Manifest, shard: int) -> dict[str, Any]:
    """The facts in a shard's checksums.json: the tokenizer and images of its latents."""
    return {
        "encoder_sha256": manifest.tokenizer["encoder_sha256"],
        "data": {name: manifest.data[name] for name in ("crop", "names_sha256")},
        "shape": list(manifest.shape),
        "shard_images": manifest.shard_images,
        "shard": shard,
    }


def is_whole(out: Path, shard: int, manifest: Manifest) -> bool:
    """Whether a shard of this tokenizer and these images exists and is intact."""
    folder = shard_folder(out, shard)
    if not folder.is_dir():
        return False
    damage = checkpoint.find_damage(folder, FILES, **belongs_to(manifest, shard))
    if damage:
        logger.warning("%s is damaged (%s): it is written again", folder, damage)
    return damage is None


@torch.inference_mode()
def encoded(
    tokenizer: Tokenizer, source: Source, batch_size: int
) -> Iterator[tuple[list[str], Tensor, Tensor, Tensor]]:
    """Names, means and log-variances (B, 2, d, h, w) of images and their mirror images, and labels (B,); on the CPU.

    Raises:
        ValueError: latents that are not finite, or an unreadable image.
    """
    device = tokenizer.latent_mean.device
    for names, labels, images in evaluation_batches(source, tokenizer.config.image_size, batch_size):
        both = torch.stack((images, images.flip(-1)), dim=1)  # (B, 2, 3, H, W)
        posterior = tokenizer.encode(to_float(both.flatten(0, 1).to(device)))
        mean, logvar = (x.cpu().unflatten(0, (-1, 2)) for x in (posterior.mean, posterior.logvar))
        finite = (mean.isfinite() & logvar.isfinite()).flatten(1).all(1)
        if not finite.all():
            raise ValueError(f"{names[int((~finite).nonzero()[0])]}: its latents hold NaN or infinite values")
        yield names, mean, logvar, labels


def with_statistics(manifest: Manifest, out: Path) -> Manifest:
    """The manifest of finished latents, with the statistics over all shards."""
    d, h, w = manifest.shape
    statistics = LatentStatistics(d)
    for shard in range(len(manifest)):
        images = min(manifest.shard_images, manifest.images - shard * manifest.shard_images)
        sums = torch.from_numpy(read_shard(shard_folder(out, shard) / "moments.npy", (2, d), np.float64))
        statistics.merge_state({"count": images * 2 * h * w, "sums": sums})
    mean, std = statistics.compute()
    return replace(manifest, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


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
