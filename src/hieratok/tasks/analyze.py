"""`hieratok analyze`: metrics of the latent space of a trained tokenizer, or of a file of latents."""

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hieratok.analysis.channels import (
    ACTIVE_VARIANCE,
    channel_kl,
    channel_moments,
    correlation,
    effective_rank,
    participation_ratio,
    standardize,
)
from hieratok.analysis.codec import Codec, Latents, codec_of, encode_all
from hieratok.analysis.commutation import commutation, equivariance, pyramid_commutation
from hieratok.analysis.config import Analyze
from hieratok.analysis.density import (
    ITERATIONS,
    MIN_POINTS,
    PERPLEXITY,
    DensityReport,
    Embedding,
    draw_points,
    evenness,
    gaussian_points,
    kernel_density,
    measure_density,
)
from hieratok.analysis.intervals import Quantity, summarize, summarize_columns
from hieratok.analysis.meanings import lines, table
from hieratok.analysis.report import Analysis, Channels, CommutationImages, Density, LatentReport, Maps, Spectrum
from hieratok.analysis.robustness import noise_psnr, seeded_noise
from hieratok.analysis.spectrum import BLOCK, MIN_SIDE, dct_profile, high_frequency_share, power_slope
from hieratok.core.checkpoint import remove_leftovers, write_json
from hieratok.core.devices import best_device
from hieratok.core.estimates import Estimate
from hieratok.core.files import read_npy, shown
from hieratok.core.lock import lock
from hieratok.core.progress import progress
from hieratok.core.seeding import numpy_generator
from hieratok.data.images import Source, open_source, to_float, to_uint8
from hieratok.evaluation.images import batches
from hieratok.tokenizer import autoencoders
from hieratok.tokenizer.model import HieraTok
from hieratok.tokenizer.scales import area_pool

SHOWN = 4  # images in the page's pictures
KDE = "Gaussian kernel, Scott's bandwidth, at the points themselves"
TSNE = f"2-D, perplexity {PERPLEXITY}, {ITERATIONS} iterations, PCA start"

# Writes a page into the folder of an analysis. Passed by the caller, so that tasks do not depend on reports.
WritePage = Callable[[Path, Analysis], None]


def analyze(options: Analyze, write_page: WritePage | None = None) -> LatentReport:
    """The command: print the numbers, write `metrics.json`; `write_page` adds a page to its folder.

    Raises:
        ValueError, FileNotFoundError: a missing run, images or file, or ones that do not fit.
    """
    if options.embedding is not None:
        found = analyze_embedding(options.embedding)
    elif options.latents is not None:
        found = analyze_latents(options.latents, options)
    else:
        found = analyze_run(options)
    inputs = {name: getattr(options, name) for name in ("run", "data", "latents", "embedding")}
    given = {name: value for name, value in inputs.items() if value is not None}
    found = replace(found, report=replace(found.report, inputs=given))
    print(table(lines(found.report)).text())
    out = options.out or (f"{options.run}/analysis" if options.run and Path(options.run).is_dir() else None)
    if out is not None:
        write(Path(out), found, write_page)
        print(f"written: {out}/metrics.json" + f" and {out}/index.html" * (write_page is not None))
    return found.report


def write(out: Path, found: Analysis, write_page: WritePage | None) -> None:
    """Write the page, and last `metrics.json`: if it exists, the page does too."""
    with lock(out, "analyze"):
        for name in ("index.html", "metrics.json"):
            remove_leftovers(out / name)
        if write_page is not None:
            write_page(out, found)
        write_json(out / "metrics.json", found.report.to_json())


def manifest(**facts: Any) -> dict[str, Any]:
    """The manifest: the given facts, and versions."""
    packages = ("hieratok", "torch", "numpy", "scipy", "scikit-learn")
    return facts | {f"{package} version": importlib.metadata.version(package) for package in packages}


# --- Files ------------------------------------------------------------------------------------------------------------


def load_array(path: str, dimensions: tuple[int, ...]) -> np.ndarray:
    """A .npy of floating-point numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a .npy, of another type or number of dimensions, or with values that are not finite.
    """
    array = read_npy(path)
    if array.dtype.kind != "f":
        raise ValueError(f"{shown(path)} must be a .npy of floating-point numbers")
    if array.ndim not in dimensions:
        wanted = " or ".join({2: "(points, channels)", 4: "(images, channels, h, w)"}[n] for n in dimensions)
        raise ValueError(f"{shown(path)} must have shape {wanted}, not {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{shown(path)} holds NaN or infinite values")
    return array.astype(np.float32)


def analyze_embedding(path: str) -> Analysis:
    """The density of a file's points (N, 2), without t-SNE.

    Raises:
        ValueError, FileNotFoundError: as `load_array`, another shape, or too few points.
    """
    points = load_array(path, (2,))
    density = kernel_density(points)
    facts = manifest(protocol="embedding", n=len(points), density=KDE)
    report = LatentReport(len(points), facts, density=Density(1, evenness(density)))
    return Analysis(f"Density of {Path(path).name}", report, Embedding(points, density))


def analyze_latents(path: str, options: Analyze) -> Analysis:
    """The density of a file's latents (N, d), or (N, d, h, w), one vector per image; standardised per channel.

    Raises:
        ValueError, FileNotFoundError: as `load_array`; too few or constant latents, one channel, or no draws.
    """
    latents = load_array(path, (2, 4))
    if options.draws < 1:
        raise ValueError("of a file of latents only the density is measured: --draws must be at least 1")
    maps = torch.from_numpy(latents.reshape(*latents.shape[:2], *(latents.shape[2:] or (1, 1))))
    mean, covariance = channel_moments(maps)
    maps = standardize(maps, mean, covariance.diagonal().sqrt())
    density, measured = density_beside_floor(maps, None, options)
    facts = manifest(
        protocol="latents", n=len(maps), points=len(measured.embedding), statistics="of these latents",
        **density_facts(measured, options),
    )  # fmt: skip
    report = LatentReport(len(maps), facts, latent_channels=maps.shape[1], density=density)
    return Analysis(f"Density of {Path(path).name}", report, Embedding(measured.embedding, measured.density))


# --- Density ----------------------------------------------------------------------------------------------------------


def density_beside_floor(latents: Tensor, mirrored: Tensor | None, options: Analyze) -> tuple[Density, DensityReport]:
    """Density metrics of standardised latents and of Gaussian noise of the same number and channels.

    Args:
        latents: (N, d, h, w).
        mirrored: latents of the mirrored images, or None.
        options: `num`, `draws`, `seed`.

    Returns:
        The numbers of both, and the report of the latents.

    Raises:
        ValueError: too few points.
    """
    n, d, h, w = latents.shape
    num, seed = min(n, options.num), options.seed
    require_points(num)
    draws = (
        1 if h * w == 1 and n == num and mirrored is None else options.draws
    )  # no random choice: all points are taken
    maps, mirror_maps = latents.numpy(), mirrored.numpy() if mirrored is not None else None
    points = measure_density((draw_points(maps, num, seed, i, mirror_maps) for i in range(draws)), draws, "t-SNE")
    floor = measure_density((gaussian_points(num, d, seed, i) for i in range(draws)), draws, "t-SNE of the floor")
    return Density(draws, points.mean, points.std, floor.mean, floor.std), points


def require_points(num: int) -> None:
    """Raise ValueError for too few points for t-SNE."""
    if num < MIN_POINTS:
        raise ValueError(
            f"{num} points, one per image, are too few for t-SNE at perplexity {PERPLEXITY}: at least {MIN_POINTS}, and"
            " thousands to compare with published numbers (--draws 0 leaves the density of a run out)"
        )


def density_facts(measured: DensityReport, options: Analyze) -> dict[str, str | int]:
    """The manifest's facts about the density."""
    return {"draws": measured.draws, "t-sne": TSNE, "density": KDE, "seed": options.seed}


# --- Tokenizers -------------------------------------------------------------------------------------------------------


def load_tokenizer(source: str, device: str | None) -> tuple[Codec, int | None, tuple[Tensor, Tensor] | None]:
    """A tokenizer, the side of its training images, and the mean and standard deviation (d,) of their latents; None for
    unknown values.

    Raises:
        FileNotFoundError, ValueError: missing files, or files that do not fit.
    """
    there = device or best_device()
    kind = autoencoders.class_of(source)
    if kind is not None:
        model = autoencoders.load(source, kind)
        return codec_of(model.to(there)), getattr(model.config, "sample_size", None), None
    model = HieraTok.from_pretrained(source, device=there)
    mean, std = model.latent_mean.double().cpu(), model.latent_std.double().cpu()
    measured = bool(mean.isfinite().all() and std.isfinite().all())
    return codec_of(model), model.config.image_size, (mean, std) if measured else None


def analyze_run(options: Analyze) -> Analysis:
    """Analyse the tokenizer and images of the options. Raises as `load_tokenizer` and `analyze_tokenizer`."""
    assert options.run is not None
    assert options.data is not None
    codec, side, statistics = load_tokenizer(options.run, options.device)
    return analyze_tokenizer(codec, open_source(options.data), options.size or side, options, statistics)


def analyze_tokenizer(
    codec: Codec,
    source: Source,
    size: int | None,
    options: Analyze,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Analysis:
    """All metrics of a tokenizer on images.

    Args:
        codec: the tokenizer.
        source: images; `options.num` of them are chosen at random.
        size: side to crop them to.
        options: `run` for the title, `protocol`, `num`, `decoded`, `draws`, `batch_size`, `seed`.
        statistics: mean and standard deviation (d,) of the training images' latents; the images' own if None, and in
            the vavae protocol.

    Returns:
        With an embedding if there are draws, and with images if there are coarser scales.

    Raises:
        ValueError: no size, too few images, unreadable ones, latents that are not finite or of a wrong shape.
    """
    if size is None:
        raise ValueError("this tokenizer does not say which size its images have: give --size")
    chosen = choose_images(source, options)
    strict = options.protocol == "vavae"
    own_statistics = strict or statistics is None

    latents = encode_source(codec, source, chosen, size, options, mirror=False)
    mirrored = encode_source(codec, source, chosen, size, options, mirror=True) if strict and options.draws else None
    z = latents.sample(options.seed) if strict else latents.mean
    shift, std = moments(z) if own_statistics or statistics is None else statistics

    density, embedding, facts = None, None, {}
    if options.draws:
        mirrored_z = standardize(mirrored.sample(options.seed + 1), shift, std) if mirrored else None
        density, measured = density_beside_floor(standardize(z, shift, std), mirrored_z, options)
        embedding, facts = embedding_of(measured, source, chosen), density_facts(measured, options)

    n, d, h, w = latents.mean.shape
    subset = np.linspace(0, n - 1, min(n, options.decoded)).astype(int)
    names, originals = load_images(source, [chosen[i] for i in subset], size)
    means = latents.mean[torch.from_numpy(subset)]
    grids = coarser_grids(codec, means)
    report = LatentReport(
        n=n,
        latent_channels=d,
        latent_grid=(h, w),
        density=density,
        channels=measure_channels(latents),
        decoded_images=len(subset),
        decoded=measure_decoded(codec, originals, means, std, grids, options),
        spectra=latent_spectra(means, shift, std, to_float(originals)),
        manifest=tokenizer_manifest(options, n, size, own_statistics, facts),
    )
    images = commutation_images(codec, names[:SHOWN], originals[:SHOWN], means[:SHOWN], grids) if grids else None
    return Analysis(f"Latent space of {options.run}", report, embedding, images)


def latent_spectra(means: Tensor, shift: Tensor, std: Tensor, images: Tensor) -> dict[Maps, Spectrum]:
    """Spectra of latents (N, d, h, w), standardised with the moments (d,), and of their images (N, 3, H, W)."""
    return measure_spectra({"latent": standardize(means, shift, std), "rgb": standardize(images, *moments(images))})


def tokenizer_manifest(
    options: Analyze, n: int, size: int, own_statistics: bool, facts: Mapping[str, str | int]
) -> dict[str, Any]:
    """The manifest of a tokenizer's analysis; `facts` are those of the density."""
    strict = options.protocol == "vavae"
    return manifest(
        protocol=options.protocol,
        n=n,
        latents="one sample of the posterior for the density, else its mean" if strict else "posterior mean",
        images="each or its mirror image, for the density" if strict else "as they are",
        crop=f"ADM centre crop to {size}",
        statistics="of these images" if own_statistics else "of the training images, with the tokenizer",
        intervals="95% of the mean over images, Student's t",
        **facts,
    )


def embedding_of(measured: DensityReport, source: Source, chosen: list[int]) -> Embedding:
    """The first draw's points, with the images' classes."""
    labels = np.array([source.label(i) for i in chosen])
    return Embedding(measured.embedding, measured.density, labels, getattr(source, "classes", ()))


def choose_images(source: Source, options: Analyze) -> list[int]:
    """Indices of `options.num` images at random, ascending.

    Raises:
        ValueError: fewer than 2 images, or too few for the density.
    """
    if len(source) < 2:
        raise ValueError("an analysis needs at least 2 images, and a reliable density thousands")
    rng = numpy_generator("images", options.seed)
    chosen = sorted(int(i) for i in rng.permutation(len(source))[: options.num])
    if options.draws:
        require_points(len(chosen))  # before the long computation
    return chosen


def moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (d,), of maps (N, d, h, w)."""
    mean, covariance = channel_moments(maps)
    return mean, covariance.diagonal().sqrt()


def encode_source(
    codec: Codec, source: Source, indices: list[int], size: int, options: Analyze, mirror: bool
) -> Latents:
    """Latents of the images at `indices`, or of their mirror images, with a progress bar."""
    with progress(total=len(indices), unit="images", title="encode mirrored" if mirror else "encode") as bar:

        def images() -> Iterator[tuple[list[str], Tensor]]:
            for names, batch in batches(source, size, options.batch_size, indices):
                yield names, batch.flip(-1) if mirror else batch
                bar.update(len(names))

        return encode_all(codec.encode, images())


def measure_channels(latents: Latents) -> Channels:
    """Rank and active channels of the posterior means, and KL in nats."""
    _, covariance = channel_moments(latents.mean)
    standard = correlation(covariance)
    active = int((covariance.diagonal() > ACTIVE_VARIANCE).sum())
    found = Channels(
        effective_rank(standard),
        participation_ratio(standard),
        active,
        len(covariance) - active,
        covariance.diagonal().sqrt().tolist(),
    )
    if latents.logvar is None:
        return found
    kl = channel_kl(latents.mean, latents.logvar)
    return replace(found, kl=summarize(kl.sum(1)), channel_kl=summarize_columns(kl))


def load_images(source: Source, indices: list[int], size: int) -> tuple[list[str], Tensor]:
    """Names and uint8 (N, 3, size, size)."""
    parts = list(batches(source, size, 64, indices))
    return [name for names, _ in parts for name in names], torch.cat([images for _, images in parts])


def measure_decoded(
    codec: Codec, originals: Tensor, z: Tensor, std: Tensor, grids: list[tuple[int, int]], options: Analyze
) -> dict[Quantity, Estimate]:
    """Means over images, with intervals, of the metrics that need decoding; with a progress bar.

    Args:
        codec: the tokenizer.
        originals: uint8 (N, 3, H, W).
        z: their latents, (N, d, h, w).
        std: of the latent channels, (d,).
        grids: of the coarser scales.
        options: `batch_size`, `seed`.
    """
    noise = seeded_noise(z.shape, options.seed)
    values: dict[Quantity, list[Tensor]] = {}
    with progress(total=len(z), unit="images", title="decode") as bar:
        for part in torch.arange(len(z)).split(options.batch_size):
            x, z_part = to_float(originals[part]), z[part]
            numbers = commutation(codec.decode, z_part, x, grids)
            if codec.decode_pyramid is not None:
                numbers |= pyramid_commutation(codec.decode_pyramid, z_part, x)
            numbers |= equivariance(codec.encode, codec.decode, z_part, x, std)
            numbers |= noise_psnr(codec.decode, z_part, x, noise[part], std)
            for quantity, value in numbers.items():
                values.setdefault(quantity, []).append(value)
            bar.update(len(part))
    return {quantity: summarize(torch.cat(parts)) for quantity, parts in values.items()}


def coarser_grids(codec: Codec, z: Tensor) -> list[tuple[int, int]]:
    """The grids of a multi-scale tokenizer's coarser scales, else halvings down to 1; coarse to fine.

    Args:
        codec: the tokenizer.
        z: any of its latents, (B, d, h, w).
    """
    h, w = z.shape[-2:]
    pyramid = codec.decode_pyramid(z[:1]) if codec.decode_pyramid is not None else []
    if len(pyramid) > 1:
        *coarse, full = ((x.shape[-2], x.shape[-1]) for x in pyramid)
        return [(height * h // full[0], width * w // full[1]) for height, width in coarse]
    halvings = []
    while h > 1 and w > 1:
        h, w = h // 2, w // 2
        halvings.append((h, w))
    return halvings[::-1]


def measure_spectra(maps: Mapping[Maps, Tensor]) -> dict[Maps, Spectrum]:
    """Cosine profile, high-frequency share and slope of each (N, C, H, W), by name; small maps lack some of them.
    Constant maps have no spectrum and do not count."""
    return {name: measure_spectrum(x) for name, x in maps.items() if min(x.shape[-2:]) >= MIN_SIDE}


def measure_spectrum(x: Tensor) -> Spectrum:
    """Of (N, C, H, W), at least 6 x 6."""
    varied = x[x.flatten(2).std(2).amax(1) > 0]

    def values(measure: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([measure(part) for part in varied.split(32)])

    slope = summarize(values(power_slope))
    if min(x.shape[-2:]) < BLOCK:
        return Spectrum(slope)
    return Spectrum(slope, summarize_columns(values(dct_profile)), summarize(values(high_frequency_share)))


def commutation_images(
    codec: Codec, names: Sequence[str], originals: Tensor, z: Tensor, grids: list[tuple[int, int]]
) -> CommutationImages:
    """Pictures of commutation, of images uint8 (B, 3, H, W) and their latents."""
    coarse = [to_uint8(codec.decode(area_pool(z, grid))) for grid in grids]
    return CommutationImages(names, originals, coarse, to_uint8(codec.decode(z)))
