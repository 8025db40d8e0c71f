"""`hieratok analyze`: the latent space of a trained tokenizer, or of a file of latents, as numbers and a page."""

import importlib.metadata
from collections.abc import Iterator
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
    draw_points,
    evenness,
    gaussian_points,
    kernel_density,
    measure_density,
)
from hieratok.analysis.intervals import summarize
from hieratok.analysis.meanings import lines, table
from hieratok.analysis.robustness import noise_psnr, seeded_noise
from hieratok.analysis.spectrum import BLOCK, MIN_SIDE, dct_profile, high_frequency_share, power_slope
from hieratok.core.checkpoint import write_json
from hieratok.core.devices import best_device
from hieratok.core.files import read_npy, shown
from hieratok.core.progress import progress
from hieratok.core.seeding import numpy_generator
from hieratok.data.images import Source, open_source, to_float, to_uint8
from hieratok.evaluation.images import batches
from hieratok.reports import page as report
from hieratok.reports.analysis import Embedding, commutation_pictures, make_page
from hieratok.tokenizer.model import HieraTok
from hieratok.tokenizer.pretrained import diffusers_class, load_diffusers
from hieratok.tokenizer.scales import area_pool

SHOWN = 4  # images in the page's pictures
KDE = "Gaussian kernel, Scott's bandwidth, at the points themselves"
TSNE = f"2-D, perplexity {PERPLEXITY}, {ITERATIONS} iterations, PCA start"


def analyze(options: Analyze) -> dict[str, Any]:
    """The command: print the numbers, write `metrics.json` and `index.html`.

    Returns:
        What is in `metrics.json`: numbers by name (`hieratok.core.glossary` says what each is; `_low` and `_high`
        are the ends of a mean's 95% interval, `_std` a deviation over draws, `floor_` Gaussian noise), and `manifest`.

    Raises:
        ValueError, FileNotFoundError: no such run, images or file, or some that do not fit; in one line.
    """
    pictures = None
    if options.embedding is not None:
        title = f"Density of {Path(options.embedding).name}"
        result, embedding = analyze_embedding(load_array(options.embedding, (2,)))
    elif options.latents is not None:
        title = f"Density of {Path(options.latents).name}"
        result, embedding = analyze_latents(load_array(options.latents, (2, 4)), options)
    else:
        assert options.run is not None
        assert options.data is not None
        title = f"Latent space of {options.run}"
        codec, side, statistics = load_tokenizer(options.run, options.device)
        result, embedding, pictures = analyze_tokenizer(
            codec, open_source(options.data), options.size or side, options, statistics
        )
    inputs = {name: getattr(options, name) for name in ("run", "data", "latents", "embedding")}
    result["inputs"] = {name: value for name, value in inputs.items() if value is not None}
    print(table(lines(result)).text())
    out = options.out or (f"{options.run}/analysis" if options.run and Path(options.run).is_dir() else None)
    if out is not None:
        summary = "How evenly, regularly and robustly a tokenizer's latents stand for images." if options.run else (
            "How evenly a set of latent vectors fills its space."
        )  # fmt: skip
        write(Path(out), result, make_page(title, summary, result, embedding, pictures))
        print(f"written: {out}/metrics.json and {out}/index.html")
    return result


def write(out: Path, result: dict[str, Any], document: report.Html) -> None:
    """`index.html` and then `metrics.json`, each whole or not at all: where the second is, the first is too."""
    out.mkdir(parents=True, exist_ok=True)
    report.write_page(out / "index.html", document)
    write_json(out / "metrics.json", result)


def manifest(**facts: Any) -> dict[str, Any]:
    """What numbers depend on: the given facts, and the versions of what computed them."""
    packages = ("hieratok", "torch", "numpy", "scipy", "scikit-learn")
    return facts | {f"{package} version": importlib.metadata.version(package) for package in packages}


# --- Files ------------------------------------------------------------------------------------------------------------


def load_array(path: str, dimensions: tuple[int, ...]) -> np.ndarray:
    """A .npy of floating-point numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no .npy, of another type or number of dimensions, or with values that are not finite.
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


def analyze_embedding(points: np.ndarray) -> tuple[dict[str, Any], Embedding]:
    """The density of points (N, 2) as they lie.

    Raises:
        ValueError: another shape, or too few points.
    """
    density = kernel_density(points)
    result: dict[str, Any] = {"n": len(points), "density_draws": 1, **evenness(density)._asdict()}
    result["manifest"] = manifest(protocol="embedding", n=len(points), density=KDE)
    return result, Embedding(points, density)


def analyze_latents(latents: np.ndarray, options: Analyze) -> tuple[dict[str, Any], Embedding | None]:
    """The density of latents (N, d), or (N, d, h, w), of which each image gives one vector; standardised per channel.

    Raises:
        ValueError: too few, constant or of fewer than two channels; or no draws.
    """
    if options.draws < 1:
        raise ValueError("a file of latents is analysed for its density alone: --draws must be at least 1")
    maps = torch.from_numpy(latents.reshape(*latents.shape[:2], *(latents.shape[2:] or (1, 1))))
    mean, covariance = channel_moments(maps)
    maps = standardize(maps, mean, covariance.diagonal().sqrt())
    result: dict[str, Any] = {"n": len(maps), "latent_channels": maps.shape[1]}
    numbers, measured = density_beside_floor(maps, None, options)
    result |= numbers
    result["manifest"] = manifest(
        protocol="latents", n=len(maps), points=len(measured.embedding), statistics="of these latents",
        **density_facts(measured, options),
    )  # fmt: skip
    return result, Embedding(measured.embedding, measured.density)


# --- Density ----------------------------------------------------------------------------------------------------------


def density_beside_floor(
    latents: Tensor, mirrored: Tensor | None, options: Analyze
) -> tuple[dict[str, Any], DensityReport]:
    """Density metrics of standardised latents and of Gaussian noise of the same number and channels.

    Args:
        latents: (N, d, h, w).
        mirrored: of the mirrored images, or None.
        options: `num`, `draws`, `seed`.

    Returns:
        The numbers, and the report of the latents.

    Raises:
        ValueError: too few points.
    """
    n, d, h, w = latents.shape
    num, seed = min(n, options.num), options.seed
    require_points(num)
    draws = (
        1 if h * w == 1 and n == num and mirrored is None else options.draws
    )  # nothing to draw: all points are taken
    maps, mirror_maps = latents.numpy(), mirrored.numpy() if mirrored is not None else None
    points = measure_density((draw_points(maps, num, seed, i, mirror_maps) for i in range(draws)), draws, "t-SNE")
    floor = measure_density((gaussian_points(num, d, seed, i) for i in range(draws)), draws, "t-SNE of the floor")
    numbers: dict[str, Any] = {"density_draws": draws}
    for prefix, measured in (("", points), ("floor_", floor)):
        for name, value in measured.mean._asdict().items():
            numbers[f"{prefix}{name}"] = value
            if measured.std is not None:
                numbers[f"{prefix}{name}_std"] = getattr(measured.std, name)
    return numbers, points


def require_points(num: int) -> None:
    """Raise ValueError where t-SNE has too few points."""
    if num < MIN_POINTS:
        raise ValueError(
            f"{num} points, one per image, are too few for t-SNE at perplexity {PERPLEXITY}: at least {MIN_POINTS}, and"
            " thousands to compare with published numbers (--draws 0 leaves the density of a run out)"
        )


def density_facts(measured: DensityReport, options: Analyze) -> dict[str, Any]:
    """What the density depends on, for the manifest."""
    return {"draws": measured.draws, "t-sne": TSNE, "density": KDE, "seed": options.seed}


# --- Tokenizers -------------------------------------------------------------------------------------------------------


def load_tokenizer(source: str, device: str | None) -> tuple[Codec, int | None, tuple[Tensor, Tensor] | None]:
    """A tokenizer, the side of the images it was trained on, and its latents' statistics over the training images, mean
    and standard deviation (d,); None for what is not known.

    Raises:
        FileNotFoundError, ValueError: nothing there, or files that do not fit.
    """
    there = device or best_device()
    kind = diffusers_class(source)
    if kind is not None:
        model = load_diffusers(source, kind)
        return codec_of(model.to(there)), getattr(model.config, "sample_size", None), None
    model = HieraTok.from_pretrained(source, device=there)
    mean, std = model.latent_mean.double().cpu(), model.latent_std.double().cpu()
    measured = bool(mean.isfinite().all() and std.isfinite().all())
    return codec_of(model), model.config.image_size, (mean, std) if measured else None


def analyze_tokenizer(
    codec: Codec,
    source: Source,
    size: int | None,
    options: Analyze,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[dict[str, Any], Embedding | None, report.Html | None]:
    """Everything that a tokenizer and images give.

    Args:
        codec: the tokenizer.
        source: images; `options.num` of them are drawn at random.
        size: side that they are cut to.
        options: `protocol`, `num`, `decoded`, `draws`, `batch_size`, `seed`.
        statistics: mean and standard deviation (d,) of the training images' latents; the images' own if None, and in
            the vavae protocol.

    Returns:
        The numbers with their manifest; the embedding, None without draws; the pictures, None without coarser scales.

    Raises:
        ValueError: no size, too few images, unreadable ones, latents that are not finite or of a wrong shape.
    """
    if size is None:
        raise ValueError("this tokenizer does not say which size its images have: give --size")
    if len(source) < 2:
        raise ValueError("an analysis needs at least 2 images, and takes thousands for a density to trust")
    rng = numpy_generator("images", options.seed)
    chosen = sorted(int(i) for i in rng.permutation(len(source))[: options.num])
    if options.draws:
        require_points(len(chosen))  # before the long part
    strict = options.protocol == "vavae"
    latents = encode_source(codec, source, chosen, size, options, mirror=False)
    mirrored = encode_source(codec, source, chosen, size, options, mirror=True) if strict and options.draws else None
    n, d, h, w = latents.mean.shape
    result: dict[str, Any] = {"n": n, "latent_channels": d, "latent_grid": [h, w]}
    z = latents.sample(options.seed) if strict else latents.mean
    if strict or statistics is None:
        shift, covariance = channel_moments(z)
        std = covariance.diagonal().sqrt()
    else:
        shift, std = statistics
    mirrored_z = mirrored.sample(options.seed + 1) if mirrored is not None else None
    standard = standardize(z, shift, std)
    mirrored_standard = standardize(mirrored_z, shift, std) if mirrored_z is not None else None
    embedding = None
    facts: dict[str, Any] = {}
    if options.draws:
        numbers, measured = density_beside_floor(standard, mirrored_standard, options)
        result |= numbers
        facts = density_facts(measured, options)
        labels = np.array([source.label(i) for i in chosen])
        embedding = Embedding(measured.embedding, measured.density, labels, getattr(source, "classes", ()))
    result |= channel_numbers(latents)

    subset = np.linspace(0, n - 1, min(n, options.decoded)).astype(int)
    names, originals = load_images(source, [chosen[i] for i in subset], size)
    means = latents.mean[torch.from_numpy(subset)]
    grids = coarser_grids(codec, means)
    result["decoded_images"] = len(subset)
    result |= decoded_numbers(codec, originals, means, std, grids, options)
    rgb_mean, rgb_covariance = channel_moments(to_float(originals))
    result |= spectrum_numbers(
        {
            "latent": standardize(means, shift, std),
            "rgb": standardize(to_float(originals), rgb_mean, rgb_covariance.diagonal().sqrt()),
        }
    )
    pictures = pictures_of(codec, names[:SHOWN], originals[:SHOWN], means[:SHOWN], grids) if grids else None
    result["manifest"] = manifest(
        protocol=options.protocol,
        n=n,
        latents="one sample of the posterior for the density, else its mean" if strict else "posterior mean",
        images="each or its mirror image, for the density" if strict else "as they are",
        crop=f"ADM centre crop to {size}",
        statistics="of these images" if strict or statistics is None else "of the training images, with the tokenizer",
        intervals="95% of the mean over images, Student's t",
        **facts,
    )
    return result, embedding, pictures


def encode_source(
    codec: Codec, source: Source, indices: list[int], size: int, options: Analyze, mirror: bool
) -> Latents:
    """Latents of the images at `indices`, or of their mirror images; shows progress."""
    with progress(total=len(indices), unit="images", title="encode mirrored" if mirror else "encode") as bar:

        def images() -> Iterator[tuple[list[str], Tensor]]:
            for names, batch in batches(source, size, options.batch_size, indices):
                yield names, batch.flip(-1) if mirror else batch
                bar.update(len(names))

        return encode_all(codec.encode, images())


def channel_numbers(latents: Latents) -> dict[str, Any]:
    """Rank and active channels of the posterior means, and nats."""
    _, covariance = channel_moments(latents.mean)
    standard = correlation(covariance)
    active = int((covariance.diagonal() > ACTIVE_VARIANCE).sum())
    result: dict[str, Any] = {
        "effective_rank": effective_rank(standard),
        "participation_ratio": participation_ratio(standard),
        "active_channels": active,
        "dead_channels": len(covariance) - active,
        "channel_std": covariance.diagonal().sqrt().tolist(),
    }
    if latents.logvar is not None:
        kl = channel_kl(latents.mean, latents.logvar)
        result |= summarize("kl", kl.sum(1)) | summarize("channel_kl", kl)
    return result


def load_images(source: Source, indices: list[int], size: int) -> tuple[list[str], Tensor]:
    """Names and uint8 (N, 3, size, size)."""
    parts = list(batches(source, size, 64, indices))
    return [name for names, _ in parts for name in names], torch.cat([images for _, images in parts])


def decoded_numbers(
    codec: Codec, originals: Tensor, z: Tensor, std: Tensor, grids: list[tuple[int, int]], options: Analyze
) -> dict[str, Any]:
    """Means over images, with intervals, of what needs decoding; shows progress.

    Args:
        codec: the tokenizer.
        originals: uint8 (N, 3, H, W).
        z: their latents, (N, d, h, w).
        std: of the latent channels, (d,).
        grids: of the coarser scales.
        options: `batch_size`, `seed`.
    """
    noise = seeded_noise(z.shape, options.seed)
    values: dict[str, list[Tensor]] = {}
    with progress(total=len(z), unit="images", title="decode") as bar:
        for part in torch.arange(len(z)).split(options.batch_size):
            x, z_part = to_float(originals[part]), z[part]
            numbers = commutation(codec.decode, z_part, x, grids)
            if codec.decode_pyramid is not None:
                numbers |= pyramid_commutation(codec.decode_pyramid, z_part, x)
            numbers |= equivariance(codec.encode, codec.decode, z_part, x, std)
            numbers |= noise_psnr(codec.decode, z_part, x, noise[part], std)
            for name, value in numbers.items():
                values.setdefault(name, []).append(value)
            bar.update(len(part))
    result: dict[str, Any] = {}
    for name, parts in values.items():
        result |= summarize(name, torch.cat(parts))
    return result


def coarser_grids(codec: Codec, z: Tensor) -> list[tuple[int, int]]:
    """The coarser scales of a multi-scale tokenizer as grids of latents, else halvings down to 1; coarse to fine.

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


def spectrum_numbers(maps: dict[str, Tensor]) -> dict[str, Any]:
    """Cosine profile, high-frequency share and slope of each (N, C, H, W), under its name; what a small map has not is
    left out. Maps that are flat have no spectrum and do not count."""
    result: dict[str, Any] = {}
    for name, x in maps.items():
        measures = {f"{name}_power_slope": power_slope}
        if min(x.shape[-2:]) >= BLOCK:
            measures |= {f"{name}_dct": dct_profile, f"{name}_high_frequency_share": high_frequency_share}
        if min(x.shape[-2:]) < MIN_SIDE:
            continue
        varied = x[x.flatten(2).std(2).amax(1) > 0]
        for key, measure in measures.items():
            result |= summarize(key, torch.cat([measure(part) for part in varied.split(32)]))
    return result


def pictures_of(
    codec: Codec, names: list[str], originals: Tensor, z: Tensor, grids: list[tuple[int, int]]
) -> report.Html:
    """What commutation looks like, for the images given: uint8 (B, 3, H, W) and their latents."""
    coarse = [to_uint8(codec.decode(area_pool(z, grid))) for grid in grids]
    return commutation_pictures(names, originals, coarse, to_uint8(codec.decode(z)))
