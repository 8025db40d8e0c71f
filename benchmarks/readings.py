"""The multi-scale decoder, reading by reading: what eqs. 8 and 9 average, down-sampling, attention, positions.

    python benchmarks/readings.py --data 'imagenette/train-*.tar' --val 'imagenette/val-*.tar' \\
        --squeezenet squeezenet1_1-caffe-fp16.npz --mobilenet mobilenet_v2-keras-fp16.npz
    python benchmarks/readings.py ... --rows single multi --seeds 0       # a part of it

64 px, f8, d 8, scales 1, 2, 4, 8, about 1.7M parameters, 24,000 images a run: 30 runs of some seven minutes each on one
core. The same command again resumes; several at once share the rows if each is given rows or seeds of its own. Writes
OUT/results.json and prints the table of docs/results.md. The networks are stand-ins: distances are not FID or LPIPS.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from hieratok.core.checkpoint import write_json
from hieratok.core.tables import Table
from hieratok.data.images import evaluation_batches, open_source, to_float, to_uint8
from hieratok.evaluation.distribution import distances
from hieratok.evaluation.features import load_network
from hieratok.evaluation.reconstruction import ReconstructionMetrics
from hieratok.evaluation.statistics import FeatureSet, SetStatistics
from hieratok.losses.lpips import PerceptualLoss
from hieratok.losses.reconstruction import LossConfig
from hieratok.studies.recipes import single
from hieratok.tokenizer import model as tokenizer_model
from hieratok.tokenizer.downsample import ConvBranch, ConvDownsample
from hieratok.tokenizer.model import HieraTok, TokenizerConfig
from hieratok.training.config import DataConfig, TrainConfig
from hieratok.training.run_folder import LOG
from hieratok.training.tokenizer import TokenizerRun, train_tokenizer


def base(options: argparse.Namespace, seed: int) -> TokenizerRun:
    """The multi-scale run that rows are variants of."""
    steps = options.images // 16
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=64,
            patch_size=8,
            latent_channels=8,
            scales=(1, 2, 4, 8),
            encoder_width=128,
            encoder_depth=2,
            encoder_heads=2,
            decoder_width=128,
            decoder_depth=3,
            decoder_heads=2,
            drop_path=0.0,
            init_std=0.06,
        ),
        data=DataConfig(path=options.data, val_path=options.val, crop="center", num_workers=0),
        loss=LossConfig(trunk="squeeze-caffe", trunk_weights=options.squeezenet),
        train=TrainConfig(
            steps=steps,
            batch_size=16,
            learning_rate=1e-3,  # at 2e-3 two seeds of one run lie half a dB apart, at 1e-3 they agree
            min_learning_rate=1e-5,
            ema_decay=0.99,
            save_every=max(1, steps // 5),
            keep_checkpoints=1,
            picture_every=steps,
            seed=seed,
        ),
    )


class ProcessedFinest(ConvDownsample):
    """The finest scale goes through three convolutions as well ("each resolution", appendix E)."""

    def __init__(self, latent_channels: int, width: int, sides: tuple[int, ...]):
        super().__init__(latent_channels, width, sides)
        self.proj: nn.Module = AtFullResolution(latent_channels, width)


class AtFullResolution(ConvBranch):
    """Three convolutions without a stride: 1 x 1, 1 x 1, 3 x 3."""

    def __init__(self, latent_channels: int, width: int):
        super().__init__(latent_channels, width, (1, 1, 1))
        self.merge = nn.Conv2d(width, width, kernel_size=1, bias=False)

    def forward(self, z: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, d, h, w) -> (B, C, h, w)."""
        return super().forward(z, grid or (z.shape[2], z.shape[3]))


class OneMap(HieraTok):
    """Positions in the decoder alone: the encoder has none, which its parameters in table 7 would fit as well."""

    def __init__(self, config: TokenizerConfig | None = None):
        super().__init__(config)
        nn.init.zeros_(self.encoder.positions.requires_grad_(False))


@dataclass(frozen=True)
class Row:
    """A variant of the base run."""

    name: str
    vary: Callable[[TokenizerRun], TokenizerRun] = lambda run: run
    model: type[HieraTok] = HieraTok
    downsample: type[ConvDownsample] = ConvDownsample


def reading(pixels: Any, perceptual: Any) -> Callable[[TokenizerRun], TokenizerRun]:
    """How eqs. 8 and 9 reduce over scales."""
    return lambda run: replace(
        run, loss=replace(run.loss, pixel_reduction=pixels, perceptual_reduction=perceptual)
    )  # fmt: skip


def shaped(**changes: Any) -> Callable[[TokenizerRun], TokenizerRun]:
    """Another model."""
    return lambda run: replace(run, model=replace(run.model, **changes))


def deep(vary: Callable[[TokenizerRun], TokenizerRun]) -> Callable[[TokenizerRun], TokenizerRun]:
    """A decoder twice as deep: the paper's has 24 layers."""
    return lambda run: shaped(decoder_depth=6)(vary(run))


ROWS = (
    Row("single", single),
    Row("multi: scales, mean", reading("scales", "mean")),
    Row("multi: scales, sum", reading("scales", "sum")),
    Row("multi: scales, finest", reading("scales", "finest")),
    Row("multi: tokens, mean", reading("tokens", "mean")),
    Row("multi: tokens, sum", reading("tokens", "sum")),
    Row("multi: tokens, finest", reading("tokens", "finest")),
    Row("interpolate", shaped(downsample="interpolate")),
    Row("independent", shaped(attention="independent")),
    Row("full", shaped(attention="full")),
    Row("finest processed", downsample=ProcessedFinest),
    Row("one map of positions", model=OneMap),
    Row("deep single", deep(single)),
    *(
        Row(f"deep multi: {pixels}, {perceptual}", deep(reading(pixels, perceptual)))
        for pixels in ("scales", "tokens")
        for perceptual in ("mean", "sum", "finest")
    ),
)  # rows without a reading have the default's


def main() -> None:
    """Train and measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="training images")
    parser.add_argument("--val", required=True, help="held-out images")
    parser.add_argument("--squeezenet", required=True, help="weights of the perceptual trunk and of FD-SqueezeNet")
    parser.add_argument("--mobilenet", required=True, help="weights of FD-MobileNetV2")
    parser.add_argument("--out", default="runs/readings", type=Path)
    parser.add_argument("--images", default=24_000, type=int, help="of training, each run")
    parser.add_argument("--seeds", default=[0, 1], type=int, nargs="+")
    parser.add_argument("--rows", default=[row.name for row in ROWS], nargs="+", choices=[row.name for row in ROWS])
    options = parser.parse_args()
    for seed in options.seeds:
        for row in ROWS:
            if row.name in options.rows:
                run_row(row, options, seed)
    results = [json.loads(path.read_text()) for path in sorted(options.out.glob("*/results.json"))]
    write_json(options.out / "results.json", results)
    print(table(results))


def run_row(row: Row, options: argparse.Namespace, seed: int) -> None:
    """Train and measure one row, unless its results are there."""
    out = options.out / f"{row.name.replace(': ', '-').replace(', ', '-').replace(' ', '-')}-{seed}"
    if (out / "results.json").is_file():
        return
    start = time.time()
    run = row.vary(base(options, seed))
    with variant(row):
        tokenizer = train_tokenizer(run, out)
    log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    facts = {
        "row": row.name,
        "seed": seed,
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "images_per_second": sum(line["images_per_second"] for line in log) / len(log),
        **measure(tokenizer, options),
        "minutes": (time.time() - start) / 60,
    }
    write_json(out / "results.json", facts)


@contextlib.contextmanager
def variant(row: Row) -> Iterator[None]:
    """Parts of a row that no setting names stand in for the package's while it trains."""
    with contextlib.ExitStack() as stack:
        if row.downsample is not ConvDownsample:
            stack.enter_context(mock.patch.object(tokenizer_model, "ConvDownsample", row.downsample))
        if row.model is not HieraTok:
            stack.enter_context(mock.patch("hieratok.training.tokenizer.HieraTok", row.model))
        yield


@torch.no_grad()
def measure(tokenizer: HieraTok, options: argparse.Namespace) -> dict[str, Any]:
    """Of all held-out images, reconstructed from the posterior mean: pixels at every scale, distances at the finest."""
    size = tokenizer.config.image_size
    perceptual = PerceptualLoss("squeeze-caffe", options.squeezenet)
    metrics = ReconstructionMetrics(None, [perceptual])
    networks = [load_network("squeezenet", options.squeezenet), load_network("mobilenetv2:load", options.mobilenet)]
    sets = [FeatureSet(network) for network in networks]
    nats, n = 0.0, 0
    source = open_source(options.val)
    for names, _, originals in evaluation_batches(source, size, 32):
        posterior = tokenizer.encode(to_float(originals))
        pyramid = [to_uint8(image) for image in tokenizer.decode_pyramid(posterior.mode())]
        metrics.update(names, originals, pyramid)
        for features in sets:
            features.update(pyramid[-1], names)
        nats += float(posterior.kl().sum())
        n += len(names)
    result: dict[str, Any] = metrics.compute().to_json() | {"kl": nats / n}
    for network, features in zip(networks, sets):
        result |= distances(features.compute(), reference(network, options, size), network)
    return result


def reference(network: Any, options: argparse.Namespace, size: int) -> SetStatistics:
    """Of the held-out images themselves, measured once."""
    path = options.out / f"reference-{network.name}.npz"
    if not path.is_file():
        features = FeatureSet(network)
        for names, _, originals in evaluation_batches(open_source(options.val), size, 32):
            features.update(originals, names)
        features.compute().save(path)
    return SetStatistics.load(path, network)


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: means over seeds, and half their range."""
    columns = {
        "PSNR": ("psnr", 2),
        "SSIM": ("ssim", 3),
        "perceptual": ("perceptual[squeeze-caffe]", 4),
        "FD-SqueezeNet": ("fd-squeezenet", 0),
        "FD-MobileNetV2": ("fd-mobilenetv2", 0),
        "KL": ("kl", 1),
        "images/s": ("images_per_second", 0),
    }
    rows = []
    for row in ROWS:
        mine = [r for r in results if r["row"] == row.name]
        if not mine:
            continue
        cells = [spread([r.get(key, math.nan) for r in mine], digits) for key, digits in columns.values()]
        *coarse, _ = mine[0].get("scales", {None: {}})
        means = [f"{sum(r['scales'][s]['psnr'] for r in mine) / len(mine):.2f}" for s in coarse]
        rows.append([row.name, *cells, " / ".join(means)])
    return Table(["", *columns, "PSNR at 8, 16, 32 px"], rows).markdown()


def spread(values: list[float], digits: int) -> str:
    """Mean, and half the range over seeds."""
    half = (max(values) - min(values)) / 2
    return f"{sum(values) / len(values):.{digits}f}" + f" ± {half:.{digits}f}" * (len(values) > 1)


if __name__ == "__main__":
    main()
