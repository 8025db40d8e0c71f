"""Writing a folder of latents.

Every shard is written whole or not at all, and checked by its checksums before it counts as done, so the same call
resumes where it was stopped; of several processes each writes a share of the shards.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hieratok.core import checkpoint
from hieratok.core.distributed import process, wait
from hieratok.core.lock import lock
from hieratok.core.progress import progress
from hieratok.data.images import Source, Subset, evaluation_batches, names_sha256, to_float
from hieratok.data.latents import MANIFEST, LatentStatistics, Manifest, read_shard, shard_folder, whose

logger = logging.getLogger(__name__)

SHARD_IMAGES = 2_048
FILES = [f"{name}.npy" for name in ("mean", "logvar", "labels", "names", "moments")]
"""Size of a shard in bytes."""


class Posterior(Protocol):
    """What encoding gives: mean and log-variance of z, each (B, d, h, w)."""

    mean: Tensor
    logvar: Tensor


class Tokenizer(Protocol):
    """What encodes, wherever its weights are."""

    latent_mean: Tensor

    def encode(self, images: Tensor) -> Posterior:
        """Images (B, 3, H, W) in [-1, 1] -> the distribution of z."""
        ...


def write(
    out: Path,
    tokenizer: Tokenizer,
    source: Source,
    size: int,
    manifest: Manifest,
    batch_size: int,
    device: str | torch.device | None = None,
) -> Manifest:
    """Write a folder of latents, or what is missing of it; every process must call.

    Args:
        out: the folder.
        tokenizer: which the manifest names.
        source: the images, which are centre-cropped.
        size: to this side.
        manifest: as of `describe`.
        batch_size: images at a time, and as many mirror images.
        device: where to encode; None: where the tokenizer is.

    Returns:
        The finished folder's manifest, with statistics.

    Raises:
        ValueError: an unreadable image, latents that are not finite or of something else in `out`, or another process
            that writes there.
    """
    with lock(out, "latents"):
        manifest = start(out, manifest)
        there = device or tokenizer.latent_mean.device

        def encode(images: Tensor) -> Posterior:
            return tokenizer.encode(images.to(there))

        write_shards(encode, source, size, manifest, out, batch_size)
        wait()
        if process()[0] == 0:
            write_manifest(out, with_statistics(manifest, out))
        wait()
    return Manifest.read(out)


def describe(tokenizer: dict[str, Any], source: Source, path: str, size: int, shape: tuple[int, int, int]) -> Manifest:
    """The manifest of latents that are still to be written.

    Args:
        tokenizer: as of `Manifest`.
        source: the images.
        path: where they are.
        size: side of the centre crop.
        shape: (d, h, w) of one latent.
    """
    return Manifest(
        tokenizer=tokenizer,
        data={"path": path, "crop": f"ADM centre crop to {size}", "names_sha256": names_sha256(source)},
        images=len(source),
        shape=shape,
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


def write_shards(
    encode: Callable[[Tensor], Posterior], source: Source, size: int, manifest: Manifest, out: Path, batch_size: int
) -> None:
    """Write this process's share of the shards, except intact ones."""
    rank, world = process()
    mine = [k for k in range(len(manifest))[rank::world] if not is_whole(out, k, manifest)]
    everything = range(len(source))
    parts = {k: Subset(source, everything[k * manifest.shard_images :][: manifest.shard_images]) for k in mine}
    with progress(total=sum(map(len, parts.values())), unit="images", title="latents") as bar:
        for shard, part in parts.items():
            statistics = LatentStatistics(manifest.shape[0])
            means, logvars, labels, names = [], [], [], []
            for batch_names, mean, logvar, batch_labels in encoded(encode, part, size, batch_size):
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
    encode: Callable[[Tensor], Posterior], source: Source, size: int, batch_size: int
) -> Iterator[tuple[list[str], Tensor, Tensor, Tensor]]:
    """Names, means and log-variances (B, 2, d, h, w) of images and their mirror images, and labels (B,); on the CPU.

    Raises:
        ValueError: latents that are not finite, or an unreadable image.
    """
    for names, labels, images in evaluation_batches(source, size, batch_size):
        both = torch.stack((images, images.flip(-1)), dim=1)  # (B, 2, 3, H, W)
        posterior = encode(to_float(both.flatten(0, 1)))
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
