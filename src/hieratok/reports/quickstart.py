"""The page of a quickstart: photos, crops and samples at every scale, curves, and what to do next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from hieratok.core.pictures import to_pil
from hieratok.core.tables import Table
from hieratok.evaluation.reconstruction import one_colour_per_token
from hieratok.evaluation.results import measured
from hieratok.reports import page as report
from hieratok.reports.evaluation import metric_table
from hieratok.tasks.quickstart import SAMPLING, WHOLE, FirstLook, QuickstartResult, Reconstructed, Trained
from hieratok.training.tokenizer import TokenizerRun

PHOTO_WIDTH = "max(150px, min(300px, 30%))"  # three in a row, two on a phone
NO_SAMPLES = "They follow when the generator is trained. If training was interrupted, the same command resumes it."


def write(out: Path, found: FirstLook) -> None:
    """Write `index.html` into a quickstart's folder, which must exist."""
    report.write_page(out / "index.html", make_page(out, found))


def make_page(out: Path, found: FirstLook) -> report.Html:
    """`index.html`; a line instead of samples before there are any."""
    run, result, crops = found.run, found.result, found.crops
    original, sizes = crops[0].original, [x.shape[-1] for x in crops[0].pyramid]
    grid = original.shape[-1] // run.model.patch_size
    pace, numbers = result.tokenizer.pace, result.numbers.finest
    psnr, baseline = numbers["psnr"], numbers["baseline_psnr"]
    minutes = pace.seconds / 60
    summary = (
        f"A multi-scale tokenizer turns each {original.shape[-1]} px image into {grid} x {grid} latent vectors of"
        f" {run.model.latent_channels} numbers, and decodes them at {len(sizes)} scales. This one was trained for"
        f" {minutes:.1f} minutes on {result.hardware}; the numbers are of held-out crops."
    )
    key = [
        (f"{psnr:.2f} dB", "PSNR of held-out crops"),
        (f"{baseline:.2f} dB", "PSNR of one colour per token"),
        (f"{psnr - baseline:+.2f} dB", "gained over one colour per token"),
        (f"{minutes:.1f} min", f"of training, {pace.images_per_second:.0f} images/s"),
    ]
    table = report.table(metric_table(measured(result.numbers)))
    return report.page(
        f"HieraTok quickstart: {run.name}",
        summary,
        [
            report.key_figures(key),
            report.section("Whole photos", *photo_pictures(run, found.photos)),
            report.section("Held-out crops", table, crop_pictures(run, crops)),
            report.section("Samples", sample_section(found)),
            report.section("Training", report.columns(*loss_curves(found.log, sizes)), settings_table(run, result)),
            report.section("Where to go from here", *next_steps(out)),
        ],
    )


def sample_section(found: FirstLook) -> report.Html:
    """The samples, or a line before there are any."""
    generator = found.result.generator
    return sample_pictures(found.samples, generator) if generator else report.text(NO_SAMPLES)


def photo_pictures(run: TokenizerRun, photos: list[Reconstructed]) -> list[report.Html]:
    """Each photo at every scale, all of the same size, next to the original and one colour per token."""
    f = run.model.patch_size
    origin = ""
    if run.data.val_path in WHOLE:
        origin = f" These are whole photos of {run.data.path}: the left three quarters of each were trained on."
    note = (
        f"Every scale is enlarged to the same size by repeating pixels. Photos"
        f" larger than {run.model.image_size} px are decoded in tiles that overlap by a quarter. Below each scale: its"
        f" PSNR against the photo at that size, and the baseline to beat, the PSNR of one colour per token: the"
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
        parts += [report.heading(photo.name), report.columns(*pictures, width=PHOTO_WIDTH)]
    return parts


def decibels(numbers: dict[str, float]) -> str:
    """A scale's PSNR and its baseline as text."""
    return f"PSNR {numbers['psnr']:.2f} dB, one colour per token {numbers['baseline_psnr']:.2f} dB"


def crop_pictures(run: TokenizerRun, crops: list[Reconstructed]) -> report.Html:
    """Every held-out crop: reconstructions coarse to fine, original, one colour per token."""
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
        f" original and the original with each {f} x {f} patch in its mean colour. Below each scale: its PSNR in dB,"
        " in brackets that of one colour per token. Select a picture to enlarge it; arrow keys show the"
        " next.",
    )


def sample_pictures(samples: list[Tensor], generator: Trained) -> report.Html:
    """The generator's samples, each at every scale."""
    rows = [report.Row(f"sample {i}", [to_pil(scale[i]) for scale in samples]) for i in range(len(samples[0]))]
    return report.picture_grid(
        [f"{scale.shape[-1]} px" for scale in samples],
        rows,
        f"One latent map each, drawn by a DiT of {generator.parameters / 1e6:.2f}M parameters"
        f" ({SAMPLING.sampler}, {SAMPLING.steps} steps, no guidance) and decoded at every scale. It was trained for"
        f" {generator.pace.seconds / 60:.1f} minutes on {generator.pace.images_seen:,} crops: too short for good"
        f" pictures.",
    )


def loss_curves(log: Sequence[Mapping[str, float]], sizes: list[int]) -> list[report.Html]:
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


def settings_table(run: TokenizerRun, result: QuickstartResult) -> report.Html:
    """The run's settings."""
    m, t, pace = run.model, run.train, result.tokenizer.pace
    rows = [
        ["model", f"{result.tokenizer.parameters / 1e6:.2f}M parameters, f{m.patch_size} d{m.latent_channels}"],
        ["scales", f"{', '.join(map(str, m.scales))} tokens a side"],
        ["multi-scale tokens, attention", f"{m.downsample}, scale-{m.attention}"],
        ["encoder", f"depth {m.encoder_depth}, width {m.encoder_width}"],
        ["decoder", f"depth {m.decoder_depth}, width {m.decoder_width}"],
        ["training images", f"{run.data.path}, {run.data.crop} crops of at least {run.data.min_area:.0%} of the area"],
        ["steps x batch", f"{t.steps:,} x {t.batch_size} = {pace.images_seen:,} images seen"],
        ["learning rate", f"{t.learning_rate:g} to {t.min_learning_rate:g}, cosine"],
        ["loss weights", f"L1 {run.loss.l1_weight:g}, MSE {run.loss.mse_weight:g}, perceptual"
         f" {run.loss.perceptual_weight:g}, KL {run.loss.kl_weight:g}"],
        ["hardware", result.hardware],
        ["time", f"{pace.seconds:.0f} s, {pace.images_per_second:.1f} images/s"],
    ]  # fmt: skip
    return report.table(Table(["setting", "value"], rows, "The run. config.yaml in the same folder has every setting."))


def next_steps(out: Path) -> list[report.Html]:
    """Commands and Python code that work as printed, except for the names in capitals."""
    folder = shlex.quote(str(out))
    commands = f"""
# every scale of your own photo
hieratok reconstruct {folder} PHOTO.jpg --out DIR
# train on a folder of photos
hieratok train tiny-multi --data PHOTOS --out runs/photos
# samples of the generator at every scale, as PNG
hieratok sample {folder}/dit --tokenizer {folder} --steps 50 --scales all --out samples
# all recipes, the paper's among them; parameters and FLOPs of the paper's tokenizer
hieratok recipes
hieratok cost f16d16-multi
# this run's curves and pictures
tensorboard --logdir {folder}
"""
    lines = f"""
import torch
from hieratok import HieraTok

tok = HieraTok.from_pretrained({str(out)!r})
with torch.inference_mode():
    z = tok.encode(tok.preprocess("PHOTO.jpg")).mode()  # the latent map, which is all that a generator sees
    for image in tok.decode_progressive(z):  # coarse to fine, each as soon as it is known
        tok.postprocess(image)[0].save(f"{{image.shape[-1]}}px.png")
"""
    return [report.code(commands, "On the command line."), report.code(lines, "In Python.")]
