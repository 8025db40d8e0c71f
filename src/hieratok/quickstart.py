"""The first look: train a small tokenizer on the bundled photos, reconstruct crops it never saw, train a small
generator on its latents, sample it at every scale, write a page of it."""

import math
import platform
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hieratok import recipes, report
from hieratok.checkpoint import write_json
from hieratok.data.images import Source, center_crop, open_source, to_uint8
from hieratok.generation.dit import DiT
from hieratok.generation.sampling import SampleConfig, sample_latents
from hieratok.pictures import to_pil
from hieratok.tokenizer.model import HieraTok
from hieratok.tokenizer.scales import area_pool
from hieratok.training.generator import GeneratorRun, train_generator
from hieratok.training.run_folder import LOG, plain, read_lines
from hieratok.training.tokenizer import TokenizerRun, reconstruct_pyramid, train_tokenizer

PROTOCOL = (
    "10 log10(255^2 / mean squared error) on uint8, one mean over all held-out centre crops; from the posterior mean"
)
SAMPLING = SampleConfig("euler", steps=50, num=6, batch_size=6, labels="balanced")


def quickstart(
    out: Path = Path("runs/quickstart"), run: TokenizerRun | None = None, generator_steps: int = 600
) -> dict[str, Any]:
    """Train both models, reconstruct held-out crops and draw samples at every scale, write `out/index.html` and
    `out/metrics.json`.

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

    generator_run = generator_of(run, out, generator_steps)
    print(
        f"Training a generator of its latents for {generator_steps:,} steps of {generator_run.train.batch_size} images"
    )
    generator = train_generator(generator_run, out / "dit")

    originals = torch.stack([center_crop(held_out.image(i), run.model.image_size) for i in range(len(held_out))])
    pyramid = reconstruct_pyramid(tokenizer, originals)
    log = read_lines(out / LOG)
    metrics = {
        **compare(originals, pyramid, run.model.patch_size),
        **speed(log),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "hardware": hardware(),
        "torch": torch.__version__,
        "protocol": PROTOCOL,
        "settings": plain(run),
        "generator": {
            **speed(read_lines(out / "dit" / LOG)),
            "parameters": sum(p.numel() for p in generator.parameters()),
            "settings": plain(generator_run),
        },
    }
    write_json(out / "metrics.json", metrics)
    samples = sample_pyramid(generator, tokenizer)
    report.write_page(out / "index.html", make_page(out, run, metrics, log, held_out, originals, pyramid, samples))
    print(
        f"PSNR of {len(originals)} held-out crops: {metrics['psnr']:.2f} dB;"
        f" of their patch-mean images: {metrics['psnr_patch_mean']:.2f} dB"
    )
    print(f"Pictures, curves and what to do next: {out / 'index.html'}")
    return metrics


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


def shrink(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, height, width), each pixel the mean colour of the area it covers."""
    return area_pool(images.double(), (height, width)).round().to(torch.uint8)


def patch_mean(images: Tensor, patch_size: int) -> Tensor:
    """uint8 (B, 3, H, W) -> each f x f patch replaced by its mean colour: the best that one colour per patch can do."""
    h, w = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    return shrink(images, h, w).repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)


def squared_errors(images: Tensor, references: Tensor) -> Tensor:
    """uint8 (B, 3, H, W), twice -> mean squared error of each image, float64 (B,)."""
    return (images.double() - references.double()).square().flatten(1).mean(1)


def decibels(squared_error: Tensor) -> float:
    """PSNR of a mean squared error on the scale 0 to 255."""
    return 10 * math.log10(255**2 / float(squared_error))


def compare(originals: Tensor, pyramid: list[Tensor], patch_size: int) -> dict[str, Any]:
    """PSNR in dB of the finest reconstruction and of the patch-mean image, and of every scale (named by its height in
    pixels) against the area-downsampled original. All arguments uint8."""
    psnr = decibels(squared_errors(pyramid[-1], originals).mean())
    baseline = decibels(squared_errors(patch_mean(originals, patch_size), originals).mean())
    per_scale = {
        str(x.shape[-2]): decibels(squared_errors(x, shrink(originals, *x.shape[-2:])).mean()) for x in pyramid
    }
    return {
        "psnr": psnr,
        "psnr_patch_mean": baseline,
        "gain_db": psnr - baseline,
        "psnr_per_scale": per_scale,
        "held_out_images": len(originals),
    }


def speed(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Images seen and time spent in training, interruptions left out."""
    before = [0, *(record["images"] for record in log)]
    seconds = sum((record["images"] - last) / record["images_per_second"] for last, record in zip(before, log))
    images = log[-1]["images"]
    return {"images_seen": images, "seconds": seconds, "images_per_second": images / seconds}


def hardware() -> str:
    """What a run trains on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def make_page(
    out: Path,
    run: TokenizerRun,
    metrics: dict[str, Any],
    log: list[dict[str, Any]],
    held_out: Source,
    originals: Tensor,
    pyramid: list[Tensor],
    samples: list[Tensor],
) -> report.Html:
    """`index.html`."""
    sizes = [x.shape[-1] for x in pyramid]
    grid = originals.shape[-1] // run.model.patch_size
    minutes = metrics["seconds"] / 60
    summary = (
        f"A multi-scale tokenizer turns each {originals.shape[-1]} px image into {grid} x {grid} latent vectors of"
        f" {run.model.latent_channels} numbers, and decodes them at {len(sizes)} scales. This one was trained for"
        f" {minutes:.1f} minutes on {metrics['hardware']}; the reconstructions below are of crops that it never saw."
    )
    key = [
        (f"{metrics['psnr']:.2f} dB", "PSNR of held-out crops"),
        (f"{metrics['psnr_patch_mean']:.2f} dB", "PSNR of their patch-mean images"),
        (f"{metrics['gain_db']:+.2f} dB", "gained over one colour per patch"),
        (f"{minutes:.1f} min", f"of training, {metrics['images_per_second']:.0f} images/s"),
    ]
    return report.page(
        f"HieraTok quickstart: {run.name}",
        summary,
        [
            report.key_figures(key),
            report.section("Reconstructions", pictures(run, held_out, originals, pyramid)),
            report.section("Fidelity", psnr_table(run, metrics)),
            report.section("Samples", sample_pictures(samples, metrics)),
            report.section("Training", report.columns(*loss_curves(log, sizes)), settings_table(run, metrics)),
            report.section("Where to go from here", *next_steps(out)),
        ],
    )


def pictures(run: TokenizerRun, held_out: Source, originals: Tensor, pyramid: list[Tensor]) -> report.Html:
    """Every held-out crop: its reconstructions coarse to fine, itself, its patch-mean image."""
    f = run.model.patch_size
    means = shrink(originals, originals.shape[-2] // f, originals.shape[-1] // f)  # one pixel per patch is enough
    stacks = [*pyramid, originals, means]
    errors = squared_errors(pyramid[-1], originals)
    rows = [
        report.Row(held_out.name(i), [to_pil(stack[i]) for stack in stacks], f"{decibels(errors[i]):.1f} dB")
        for i in range(len(originals))
    ]
    titles = [*(f"{x.shape[-1]} px" for x in pyramid), "original", "patch mean"]
    is_bundled = run.data.val_path == "bundled:val"
    origin = " (the right quarters of photos whose other three quarters are trained on)" if is_bundled else ""
    return report.picture_grid(
        titles,
        rows,
        f"Held-out crops of {run.data.val_path}{origin}, decoded at every scale from the posterior mean, beside the"
        f" original and the patch-mean image (each {f} x {f} patch replaced by its mean colour). Below each name: PSNR"
        f" of the {pyramid[-1].shape[-1]} px picture. Select a picture to enlarge it; arrow keys go on to the next.",
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


def psnr_table(run: TokenizerRun, metrics: dict[str, Any]) -> report.Html:
    """PSNR of every scale and of the patch-mean image."""
    *coarse, finest = metrics["psnr_per_scale"]
    rows = [
        [f"scale {s} px", f"area-downsampled original, {s} px", f"{metrics['psnr_per_scale'][s]:.2f}"] for s in coarse
    ]
    rows.append([f"scale {finest} px", "original", f"{metrics['psnr']:.2f}"])
    rows.append(["patch-mean image", "original", f"{metrics['psnr_patch_mean']:.2f}"])
    return report.table(
        ["image", "compared with", "PSNR (dB)"],
        rows,
        f"{metrics['held_out_images']} held-out crops; {PROTOCOL}. The last row is the best that one colour per patch"
        f" can do.",
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
    return report.table(["setting", "value"], rows, "The run; config.yaml beside this page has every setting.")


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
