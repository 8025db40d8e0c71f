"""The first look: train a small tokenizer on the bundled photos, reconstruct crops it never saw, train a small
generator on its latents, sample it at every scale, write a page of it."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hieratok.core.checkpoint import write_json
from hieratok.core.devices import hardware
from hieratok.core.pictures import fit, to_pil
from hieratok.core.tables import Table
from hieratok.core.typed import plain
from hieratok.data.images import Source, evaluation_batches, open_source, to_uint8
from hieratok.evaluation.pixels import PIXEL_PROTOCOL
from hieratok.evaluation.reconstruction import BASELINE_PROTOCOL, ReconstructionMetrics, one_colour_per_token
from hieratok.evaluation.results import format_result, measured
from hieratok.generation.dit import DiT
from hieratok.generation.sampling import SampleConfig, sample_latents
from hieratok.reports import page as report
from hieratok.reports.evaluation import metric_table
from hieratok.studies import recipes
from hieratok.tasks.reconstruct import reconstruct_any
from hieratok.tokenizer.model import HieraTok
from hieratok.training.generator import GeneratorRun, train_generator
from hieratok.training.run_folder import LOG, read_log
from hieratok.training.runs import speed
from hieratok.training.tokenizer import TokenizerRun, reconstruct_pyramid, train_tokenizer

PHOTOS = 3  # that are shown whole
PHOTO_SIDE = 512  # pixels of the longer side that they are reduced to
WHOLE = {"bundled:val": "bundled:whole"}  # held-out images that are parts of photos: where the photos are
NO_SAMPLES = "They come when the generator is trained. If that was interrupted, the same command goes on with it."
SAMPLING = SampleConfig("euler", steps=50, num=6, batch_size=6, labels="balanced")


def quickstart(
    out: Path = Path("runs/quickstart"), run: TokenizerRun | None = None, generator_steps: int = 600
) -> dict[str, Any]:
    """Train both models, reconstruct photos and draw samples at every scale, write `out/index.html` and
    `out/metrics.json`: once the tokenizer is trained, and again with the generator's samples.

    Finished runs in `out` are not trained again, unfinished ones go on.

    Args:
        out: the tokenizer's run; the generator's is `out/dit`.
        run: the tokenizer to train; the recipe `tiny-multi` unless given. Its `data.val_path` says which images are
            held out.
        generator_steps: how long to train the generator.

    Returns:
        What is in `metrics.json`.

    Raises:
        ValueError, FileNotFoundError: settings or images that do not fit or are missing.
        TrainingError: training cannot go on.
    """
    run = run or replace(recipes.tiny_multi(), name="tiny-multi")
    if run.data.val_path is None:
        raise ValueError("quickstart needs images that are never trained on: set data.val_path")
    held_out = open_source(run.data.val_path)
    print(f"Training {run.name} for {run.train.steps:,} steps of {run.train.batch_size} images on {hardware()}")
    tokenizer = train_tokenizer(run, out)
    crops, comparison = reconstruct_crops(tokenizer, held_out)
    photos = reconstruct_photos(tokenizer, open_source(WHOLE.get(run.data.val_path, run.data.val_path)))
    log = read_log(out / LOG)
    metrics: dict[str, Any] = {
        **comparison,
        **speed(log),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "hardware": hardware(),
        "torch": torch.__version__,
        "protocol": PIXEL_PROTOCOL | BASELINE_PROTOCOL | {"latents": "posterior mean", "crop": "ADM centre crop"},
        "settings": plain(run),
    }

    def write(samples: list[Tensor]) -> None:
        write_json(out / "metrics.json", metrics)
        report.write_page(out / "index.html", make_page(out, run, metrics, log, crops, photos, samples))

    write([])
    print(f"The held-out crops at every scale:\n{format_result(comparison)}")
    print(f"Reconstructions and curves: {out / 'index.html'} (samples follow)")

    generator_run = generator_of(run, out, generator_steps)
    print(
        f"Training a generator of its latents for {generator_steps:,} steps of {generator_run.train.batch_size} images"
    )
    generator = train_generator(generator_run, out / "dit")
    metrics["generator"] = {
        **speed(read_log(out / "dit" / LOG)),
        "parameters": sum(p.numel() for p in generator.parameters()),
        "settings": plain(generator_run),
    }
    write(sample_pyramid(generator, tokenizer))
    print(f"Pictures, samples, curves and what to do next: {out / 'index.html'}")
    return metrics


@dataclass(frozen=True)
class Reconstructed:
    """An image at every scale."""

    name: str
    original: Tensor
    """uint8 (3, H, W)."""
    pyramid: list[Tensor]
    """uint8 (3, H_k, W_k), coarse to fine; the last has the original's size."""
    numbers: list[dict[str, float]]
    """Each scale's `psnr` and `baseline_psnr` (of one colour per token), in dB."""


def reconstruct_crops(tokenizer: HieraTok, source: Source) -> tuple[list[Reconstructed], dict[str, Any]]:
    """All images of a source as `hieratok evaluate reconstruction` crops them, and the numbers that it finds."""
    config = tokenizer.config
    ((names, _, originals),) = evaluation_batches(source, config.image_size, batch_size=len(source))
    pyramid = reconstruct_pyramid(tokenizer, originals)
    metrics = ReconstructionMetrics(patch_size=config.patch_size)
    metrics.update(names, originals, pyramid)
    crops = [
        Reconstructed(name, originals[i], [x[i] for x in pyramid], list(metrics.of_image(name).values()))
        for i, name in enumerate(names)
    ]
    return crops, metrics.compute()


def reconstruct_photos(tokenizer: HieraTok, source: Source) -> list[Reconstructed]:
    """A source's first photos, uncut, of at most 512 px."""
    photos = []
    for i in range(min(PHOTOS, len(source))):
        name, image = source.name(i), source.image(i)
        photo = fit(image, min(image.shape[-2], PHOTO_SIDE), min(image.shape[-1], PHOTO_SIDE))
        pyramid = reconstruct_any(tokenizer, photo)
        metrics = ReconstructionMetrics(patch_size=tokenizer.config.patch_size)
        metrics.update([name], photo[None], [x[None] for x in pyramid])
        photos.append(Reconstructed(name, photo, pyramid, list(metrics.of_image(name).values())))
    return photos


def generator_of(run: TokenizerRun, out: Path, steps: int) -> GeneratorRun:
    """A small DiT on the latents of the images that the tokenizer learned from, all of one class."""
    tiny = recipes.get("dit-tiny")
    assert isinstance(tiny, GeneratorRun)
    channels, side = run.model.latent_channels, run.model.scales[-1]
    return replace(
        tiny,
        name="dit",
        tokenizer=str(out),
        model=replace(tiny.model, latent_channels=channels, latent_size=side, num_classes=1),
        data=run.data,
        train=replace(
            tiny.train,
            steps=steps,
            batch_size=32,
            learning_rate=1e-3,
            min_learning_rate=1e-3,
            ema_decay=0.99,
            save_every=100,
            picture_every=0,
        ),
    )


@torch.inference_mode()
def sample_pyramid(generator: DiT, tokenizer: HieraTok) -> list[Tensor]:
    """A few samples at every scale, coarse to fine: uint8 (B, 3, H_k, W_k). Always the same ones."""
    assert generator.latents is not None
    (batch,) = sample_latents(generator, SAMPLING)
    return [to_uint8(x).cpu() for x in tokenizer.decode_pyramid(generator.latents.denormalize(batch.latents))]


def make_page(
    out: Path,
    run: TokenizerRun,
    metrics: dict[str, Any],
    log: list[dict[str, Any]],
    crops: list[Reconstructed],
    photos: list[Reconstructed],
    samples: list[Tensor],
) -> report.Html:
    """`index.html`; without `samples`, a line in their place."""
    original, sizes = crops[0].original, [x.shape[-1] for x in crops[0].pyramid]
    grid = original.shape[-1] // run.model.patch_size
    minutes = metrics["seconds"] / 60
    summary = (
        f"A multi-scale tokenizer turns each {original.shape[-1]} px image into {grid} x {grid} latent vectors of"
        f" {run.model.latent_channels} numbers, and decodes them at {len(sizes)} scales. This one was trained for"
        f" {minutes:.1f} minutes on {metrics['hardware']}; the numbers are of crops that it never saw."
    )
    key = [
        (f"{metrics['psnr']:.2f} dB", "PSNR of held-out crops"),
        (f"{metrics['baseline_psnr']:.2f} dB", "PSNR of one colour per token"),
        (f"{metrics['psnr'] - metrics['baseline_psnr']:+.2f} dB", "gained over one colour per token"),
        (f"{minutes:.1f} min", f"of training, {metrics['images_per_second']:.0f} images/s"),
    ]
    return report.page(
        f"HieraTok quickstart: {run.name}",
        summary,
        [
            report.key_figures(key),
            report.section("Whole photos", *photo_pictures(run, photos)),
            report.section("Held-out crops", report.table(metric_table(measured(metrics))), crop_pictures(run, crops)),
            report.section("Samples", sample_pictures(samples, metrics) if samples else report.text(NO_SAMPLES)),
            report.section("Training", report.columns(*loss_curves(log, sizes)), settings_table(run, metrics)),
            report.section("Where to go from here", *next_steps(out)),
        ],
    )


def photo_pictures(run: TokenizerRun, photos: list[Reconstructed]) -> list[report.Html]:
    """Each photo at every scale, all of one size, with the original and one colour per token beside them."""
    f = run.model.patch_size
    origin = ""
    if run.data.val_path in WHOLE:
        origin = f" These are whole photos of {run.data.path}: the left three quarters of each were trained on."
    note = (
        f"Every scale is enlarged to one size by repeating its pixels, so that it is as coarse as it looks. Photos"
        f" larger than {run.model.image_size} px are decoded in tiles that overlap by a quarter. Below each scale stand"
        f" its PSNR against the photo at that size, and what it has to beat: the PSNR of one colour per token, the"
        f" photo at that size with each {f} x {f} patch in its mean colour.{origin}"
    )
    parts = [report.text(note)]
    for photo in photos:
        height, width = photo.original.shape[-2:]
        shown = [
            (f"{x.shape[-1]} x {x.shape[-2]} px", decibels(numbers), x)
            for x, numbers in zip(photo.pyramid, photo.numbers)
        ]
        colours = one_colour_per_token(photo.original[None], f)[0]
        shown += [("original", "", photo.original), (f"one colour per token at {width} x {height} px", "", colours)]
        pictures = [
            report.picture(
                to_pil(F.interpolate(image[None], (height, width))[0]),
                f"{photo.name}, {title}",
                f"{title}: {text}" if text else title,
            )
            for title, text, image in shown
        ]
        parts += [report.text(photo.name), report.columns(*pictures, width=300)]
    return parts


def decibels(numbers: dict[str, float]) -> str:
    """A scale's PSNR and that of its baseline, in words."""
    return f"PSNR {numbers['psnr']:.2f} dB, one colour per token {numbers['baseline_psnr']:.2f} dB"


def crop_pictures(run: TokenizerRun, crops: list[Reconstructed]) -> report.Html:
    """Every held-out crop: its reconstructions coarse to fine, itself, one colour per token."""
    f = run.model.patch_size
    rows = []
    for crop in crops:
        colours = one_colour_per_token(crop.original[None], f)[0]
        captions = [f"{n['psnr']:.1f} ({n['baseline_psnr']:.1f})" for n in crop.numbers]
        pictures = [to_pil(image) for image in (*crop.pyramid, crop.original, colours)]
        rows.append(report.Row(crop.name, pictures, captions=[*captions, "", ""]))
    titles = [*(f"{x.shape[-1]} px" for x in crops[0].pyramid), "original", "one colour per token"]
    origin = ""
    if run.data.val_path in WHOLE:
        origin = " (from the right quarters of photos whose other three quarters are trained on)"
    return report.picture_grid(
        titles,
        rows,
        f"Held-out crops of {run.data.val_path}{origin}, decoded at every scale from the posterior mean, beside the"
        f" original and the original with each {f} x {f} patch in its mean colour. Below each scale its PSNR in dB, and"
        " in brackets that of one colour per token at its size. Select a picture to enlarge it; arrow keys go on to the"
        " next.",
    )


def sample_pictures(samples: list[Tensor], metrics: dict[str, Any]) -> report.Html:
    """The generator's samples, each at every scale."""
    generator = metrics["generator"]
    rows = [report.Row(f"sample {i}", [to_pil(scale[i]) for scale in samples]) for i in range(len(samples[0]))]
    return report.picture_grid(
        [f"{scale.shape[-1]} px" for scale in samples],
        rows,
        f"One latent map each, drawn by a DiT of {generator['parameters'] / 1e6:.2f}M parameters"
        f" ({SAMPLING.sampler}, {SAMPLING.steps} steps, no guidance) and decoded at every scale. It was trained for"
        f" {generator['seconds'] / 60:.1f} minutes on {generator['images_seen']:,} crops: enough to see the way, not"
        f" for good pictures.",
    )


def loss_curves(log: list[dict[str, Any]], sizes: list[int]) -> list[report.Html]:
    """The total loss, and the L1 error of each scale, over images seen."""
    images = [record["images"] for record in log]
    total = report.Line("loss", images, [record["loss"] for record in log])
    scales = [report.Line(f"{size} px", images, [record[f"l1/{size}"] for record in log]) for size in sizes]
    return [
        report.line_plot([total], "images seen", "training loss", "Total training loss.", log_y=True),
        report.line_plot(
            scales,
            "images seen",
            "mean absolute error",
            "L1 error of each scale against the image at that size; pixels in [-1, 1], 0.01 is 1.3 of 255 grey levels.",
            log_y=True,
        ),
    ]


def settings_table(run: TokenizerRun, metrics: dict[str, Any]) -> report.Html:
    """What the run was."""
    m, t = run.model, run.train
    rows = [
        ["model", f"{metrics['parameters'] / 1e6:.2f}M parameters, f{m.patch_size} d{m.latent_channels}"],
        ["scales", f"{', '.join(map(str, m.scales))} tokens a side"],
        ["multi-scale tokens, attention", f"{m.downsample}, scale-{m.attention}"],
        ["encoder", f"depth {m.encoder_depth}, width {m.encoder_width}"],
        ["decoder", f"depth {m.decoder_depth}, width {m.decoder_width}"],
        ["training images", f"{run.data.path}, {run.data.crop} crops of at least {run.data.min_area:.0%} of the area"],
        ["steps x batch", f"{t.steps:,} x {t.batch_size} = {metrics['images_seen']:,} images seen"],
        ["learning rate", f"{t.learning_rate:g} to {t.min_learning_rate:g}, cosine"],
        ["loss weights", f"L1 {run.loss.l1_weight:g}, MSE {run.loss.mse_weight:g}, perceptual"
         f" {run.loss.perceptual_weight:g}, KL {run.loss.kl_weight:g}"],
        ["hardware", metrics["hardware"]],
        ["time", f"{metrics['seconds']:.0f} s, {metrics['images_per_second']:.1f} images/s"],
    ]  # fmt: skip
    return report.table(Table(["setting", "value"], rows, "The run; config.yaml beside this page has every setting."))


def next_steps(out: Path) -> list[report.Html]:
    """Commands and Python lines that work as they stand, but for the names in capitals."""
    folder = shlex.quote(str(out))
    commands = f"""
# every scale of your own photo
hieratok reconstruct {folder} PHOTO.jpg --out DIR
# train on a folder of photos
hieratok train tiny-multi --data PHOTOS --out runs/photos
# samples of the generator at every scale, as PNG
hieratok sample {folder}/dit --tokenizer {folder} --sampler euler --steps 50 --scales all --out samples
# all recipes, the paper's among them; parameters and FLOPs of the paper's tokenizer
hieratok recipes
hieratok cost f16d16-multi
# this run's curves and pictures
tensorboard --logdir {folder}
"""
    lines = f"""
from hieratok import HieraTok
from hieratok.data.images import center_crop, open_source, to_float

tok = HieraTok.from_pretrained({str(out)!r})
photo = center_crop(open_source("PHOTO.jpg").image(0), tok.config.image_size)
z = tok.encode(to_float(photo[None])).mode()  # the latent map, which is all that a generator sees
for image in tok.decode_progressive(z):  # coarse to fine, each as soon as it is known
    print(tuple(image.shape))
"""
    return [report.code(commands, "On the command line."), report.code(lines, "In Python.")]
