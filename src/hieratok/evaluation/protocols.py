"""The evaluation protocols, from images to numbers with a manifest.

    evaluate_reconstruction   originals and reconstructions from a tokenizer: rFID, PSNR, SSIM, LPIPS
    evaluate_images           the same for any two sets of image files
    evaluate_samples          generated images against a reference: FID, sFID, IS, KID, precision, recall
    write_statistics          a reference as a file
    compare                   two results, if their manifests agree

Each takes its command's options as a dataclass and prints a table or JSON; the first three write a `Result` as
`metrics.json` and return it. Under `torchrun` the images are divided among the processes.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hieratok.core.checkpoint import remove_leftovers
from hieratok.core.devices import best_device
from hieratok.core.distributed import merge_processes, process, process_group, wait
from hieratok.core.files import npz_names
from hieratok.core.lock import lock
from hieratok.core.progress import progress
from hieratok.data.images import Source
from hieratok.evaluation.config import (
    EvaluateCompare,
    EvaluateImages,
    EvaluateReconstruction,
    EvaluateSamples,
    EvaluateStats,
    EvaluationOptions,
)
from hieratok.evaluation.distribution import distances
from hieratok.evaluation.features import FeatureNetwork, load_network
from hieratok.evaluation.images import batches, open_images, pair
from hieratok.evaluation.pixels import PIXEL_PROTOCOL, Perceptual
from hieratok.evaluation.reconstruction import BASELINE_PROTOCOL, Numbers, ReconstructionMetrics
from hieratok.evaluation.results import Difference, Result, WritePage, compare_files, count_warnings, finish, manifest
from hieratok.evaluation.statistics import REFERENCE_FEATURES, FeatureSet, SetStatistics
from hieratok.losses.lpips import PerceptualLoss

# --- Options, one dataclass a command ------------------------------------------------------------------------------


# --- Reconstruction ------------------------------------------------------------------------------------------------


def evaluate_reconstruction(
    pairs: Iterable[tuple[Sequence[str], Tensor, Tensor | Sequence[Tensor]]],
    options: EvaluateReconstruction,
    total: int | None = None,
    details: Mapping[str, str] | None = None,
    network: FeatureNetwork | None = None,
    perceptual: Sequence[Perceptual] | None = None,
    write_page: WritePage | None = None,
    patch_size: int | None = None,
) -> Result:
    """The reconstruction protocol, on batches from the caller.

    Args:
        pairs: (names, originals, reconstructions) as `ReconstructionMetrics.update` takes them; of all processes
            together each image once.
        options: of the command.
        total: how many images this process will see, for the progress bar.
        details: further facts for the manifest, such as the crop and the precision.
        network, perceptual: if already loaded; default: those of `options`.
        write_page: writes a page next to metrics.json.
        patch_size: side of a token's patch in pixels, for the baseline of one colour per token; None: no baseline.

    Raises:
        ValueError, FileNotFoundError: bad images or weights, in one line.
    """
    metrics = ReconstructionMetrics(
        network or _network(options),
        load_perceptual(options.lpips, _device(options)) if perceptual is None else perceptual,
        patch_size,
    )
    with progress(total=total, unit="images", title="reconstruction") as bar:
        for names, originals, reconstructions in pairs:
            metrics.update(names, originals, reconstructions)
            bar.update(len(names))
    merge_processes(metrics)
    latents = {"latents": "one sample of the posterior" if options.sample else "posterior mean"}
    quantiser = {"quantiser": "clamp, round to uint8"}
    inputs = {"run": options.run, "data": options.data}
    result = _paired_result("reconstruction", metrics, latents | quantiser | dict(details or {}), inputs)
    out = options.out or os.path.join(options.run, "evaluation")
    finish(result, options.json, out, metrics, write_page)
    return result


def evaluate_images(options: EvaluateImages, write_page: WritePage | None = None) -> Result:
    """The command `hieratok evaluate images`; `write_page` writes a page next to metrics.json.

    Raises ValueError or FileNotFoundError, in one line that names the file.
    """
    with process_group():
        a, b = open_images(options.a), open_images(options.b)
        ids, in_a, in_b = pair(a, b, options.a, options.b, options.suffix or "")
        size = _size(options, a)
        metrics = ReconstructionMetrics(_network(options), load_perceptual(options.lpips, _device(options)))
        rank, world = process()
        both = zip(
            batches(a, size, options.batch_size, in_a, rank, world),
            batches(b, size, options.batch_size, in_b, rank, world),
        )
        ids = iter(ids[rank::world])
        with progress(total=len(in_a[rank::world]), unit="images", title="pairs") as bar:
            for (_, originals), (_, reconstructions) in both:
                metrics.update([next(ids) for _ in originals], originals, reconstructions)
                bar.update(len(originals))
        merge_processes(metrics)
        facts = {"quantiser": "none: 8-bit files", "crop": _crop(size)}
        result = _paired_result("images", metrics, facts, {"a": options.a, "b": options.b})
        finish(result, options.json, options.out, metrics, write_page)
        return result


def _paired_result(
    protocol: str, metrics: ReconstructionMetrics, details: Mapping[str, str], inputs: Mapping[str, str]
) -> Result:
    numbers = metrics.compute()
    n = int(numbers.finest["n"])
    perceptual = {p.name: getattr(p, "sha256", {}) for p in metrics.perceptual}
    facts = manifest(protocol, metrics.network) | PIXEL_PROTOCOL | {"perceptual": perceptual}
    facts |= BASELINE_PROTOCOL if metrics.patch_size else {}
    facts |= {"n": n, "reference sha256": metrics.reference(), **details}
    intervals = {
        side: {name: (value.low, value.high) for name, value in row.items()}
        for side, row in metrics.estimates().items()
    }
    return Result(numbers, facts, count_warnings(n, metrics.dimensions(), "images"), inputs, intervals)


# --- Samples and statistics ----------------------------------------------------------------------------------------


def evaluate_samples(options: EvaluateSamples, write_page: WritePage | None = None) -> Result:
    """The command `hieratok evaluate samples`; `write_page` writes a page next to metrics.json.

    Raises ValueError or FileNotFoundError, in one line that names the file.
    """
    with process_group():
        network = _network(options)
        if network is None:
            raise ValueError("samples are evaluated by distances alone: --features none leaves nothing to compute")
        source = open_images(options.path)
        size = _size(options, source)
        reference = _reference(options, network, size)  # first: errors in it then come before the long part
        samples = collect(source, network, size, options.batch_size, "samples", keep=None)
        numbers = {"n": samples.pool.n, **distances(samples, reference, network)}
        facts = manifest("samples", network) | {
            "n": samples.pool.n,
            "reference n": reference.pool.n,
            "reference sha256": reference.images,
            "quantiser": "none: 8-bit files",
            "crop": _crop(size),
        }
        inputs = {"path": options.path, "reference": options.reference, "sha256": samples.images}
        warnings = _sample_warnings(numbers, samples, reference, network)
        result = Result(Numbers(numbers), facts, warnings, inputs)
        finish(result, options.json, options.out, write_page=write_page)
        return result


def _sample_warnings(
    numbers: Mapping[str, float], samples: SetStatistics, reference: SetStatistics, network: FeatureNetwork
) -> list[str]:
    """Warnings about numbers that are unreliable or could not be measured."""
    warnings = count_warnings(samples.pool.n, len(samples.pool.mu), "samples")
    warnings += count_warnings(reference.pool.n, len(reference.pool.mu), "reference images")
    wanted = [network.key("kid"), "precision", "recall"]
    wanted += [network.key("is")] if network.class_weights is not None else []
    if missing := [key for key in wanted if key not in numbers]:
        warnings.append(f"too few images, or a reference without features: no {', '.join(missing)}")
    return warnings


def write_statistics(options: EvaluateStats) -> SetStatistics:
    """The command `hieratok evaluate stats`.

    Raises ValueError or FileNotFoundError, in one line that names the file.
    """
    with process_group():
        network = _network(options)
        if network is None:
            raise ValueError("statistics are of features: --features none leaves nothing to compute")
        if not options.out.endswith(".npz"):
            raise ValueError(f"--out {options.out} must end in .npz")
        source = open_images(options.path)
        size = _size(options, source)
        statistics = collect(source, network, size, options.batch_size, "statistics")
        if process()[0] == 0:
            out = Path(options.out)
            with lock(out.parent, "evaluate stats", f".{out.name}.lock"):
                remove_leftovers(out)
                statistics.save(out)
            facts = {"out": options.out, "n": statistics.pool.n, "images sha256": statistics.images}
            facts |= network.description() | {"crop": _crop(size)}
            print(json.dumps(facts, indent=2) if options.json else "\n".join(f"{k}: {v}" for k, v in facts.items()))
        wait()
        return statistics


def collect(
    source: Source,
    network: FeatureNetwork,
    size: int | tuple[int, int],
    batch_size: int,
    what: str,
    keep: int | None = REFERENCE_FEATURES,
) -> SetStatistics:
    """The statistics of a source's images over all processes; every process must call it.

    Args:
        source: images.
        network: gives the features.
        size: side to crop to, or the size that all images must have.
        batch_size: images at a time.
        what: name of the images, for the progress bar.
        keep: number of images whose features are kept besides the sums; None: all.
    """
    rank, world = process()
    features = FeatureSet(network, keep)
    total = len(range(rank, len(source), world))
    with progress(total=total, unit="images", title=what) as bar:
        for names, images in batches(source, size, batch_size, process_index=rank, num_processes=world):
            features.update(images, names)
            bar.update(len(names))
    merge_processes(features)
    return features.compute()


def _reference(options: EvaluateSamples, network: FeatureNetwork, size: int | tuple[int, int]) -> SetStatistics:
    """Statistics from images or a file; ADM's file also has images, for precision, recall and KID."""
    arrays = _array_names(options.reference)
    if "mu" not in arrays:
        return collect(open_images(options.reference), network, size, options.batch_size, "reference")
    statistics = SetStatistics.load(options.reference, network)
    if statistics.features is None and "arr_0" in arrays:
        images = open_images(options.reference)
        collected = collect(images, network, _shape(images), options.batch_size, "reference")
        return replace(statistics, features=collected.features, size=collected.size)
    return statistics


def _array_names(path: str) -> list[str]:
    return npz_names(path) if path.endswith(".npz") else []


def compare(options: EvaluateCompare) -> dict[str, Difference]:
    """The command `hieratok evaluate compare`. Raises as `compare_files` does."""
    table, text = compare_files(options.a, options.b)
    print(json.dumps({key: row._asdict() for key, row in table.items()}, indent=2) if options.json else text)
    return table


# --- What options mean ---------------------------------------------------------------------------------------------


def _network(options: EvaluationOptions) -> FeatureNetwork | None:
    if options.features == "none":
        return None
    return load_network(options.features, options.weights, _device(options))


def load_perceptual(trunks: Sequence[str], device: str) -> list[PerceptualLoss]:
    """Perceptual distances by trunk, each optionally =FILE with its weights, as for `--lpips`.

    Raises:
        ValueError, FileNotFoundError: no such trunk, or no weights for it.
    """
    losses = []
    for entry in trunks:
        trunk, _, weights = entry.partition("=")
        try:
            losses.append(PerceptualLoss(trunk, weights or None).to(device))  # type: ignore[arg-type]
        except FileNotFoundError as error:  # its advice is for settings of training
            what = str(error).split(": ")[0]
            raise FileNotFoundError(
                f"{what}; give it with --lpips '[{trunk}=FILE]', or leave LPIPS out with --lpips '[]'"
            ) from error
    return losses


def _device(options: EvaluationOptions) -> str:
    return options.device or str(best_device())


def _size(options: EvaluationOptions, source: Source) -> int | tuple[int, int]:
    """The side to crop to, or the size of the first image, which all must have."""
    if options.size is None:
        return _shape(source)
    if options.size < 1:
        raise ValueError(f"--size must be at least 1, not {options.size}")
    return options.size


def _shape(source: Source) -> tuple[int, int]:
    height, width = source.image(0).shape[1:]
    return height, width


def _crop(size: int | tuple[int, int]) -> str:
    return f"ADM centre crop to {size}" if isinstance(size, int) else f"none: all images are {size[0]} x {size[1]}"
