"""The page of an analysis: tables with explanations, the embedding, curves, pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hieratok.analysis.density import DensityMetrics, Embedding
from hieratok.analysis.meanings import lines, table
from hieratok.analysis.report import Analysis, Channels, CommutationImages, Density, LatentReport, Maps
from hieratok.core.estimates import Estimate
from hieratok.core.pictures import to_pil
from hieratok.core.tables import Table, flat
from hieratok.evaluation.reconstruction import area_resize
from hieratok.reports import page as report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPECTRA: dict[str, Maps] = {"latents": "latent", "images": "rgb"}
MANY_CLASSES = 20  # more classes share colours

DENSITY_TEXT = (
    "Each image gives one latent vector; t-SNE embeds the vectors in the plane, and a kernel estimates the density at"
    " each of them. The three numbers say how unequal these densities are. The paper's table 5 (f16d16):"
    " CV 0.522, Gini 0.299, entropy 0.984 for a single scale and 0.381, 0.216, 0.991 for several."
)
FLOOR_TEXT = (
    "The Gaussian floor is the value for as many vectors of N(0, I) noise in as many dimensions: t-SNE and kernel find"
    " some unevenness in any set of points. Latents can be below it (VA-VAE's published ones have a CV of 0.26 where"
    " the floor is 0.42): they are then spread more evenly than a Gaussian. Lower than the floor is not closer to the"
    " prior."
)
COMMUTATION_TEXT = (
    "Appendix B of the paper: if a tokenizer reconstructs well at every scale, reducing the latent map and decoding it"
    " (D(T z)) gives the same picture as decoding it and reducing the picture (T D(z)). The error is small for a"
    " blurred reconstruction too, so compare it with the error against the reduced original."
)
SPECTRUM_TEXT = (
    "Natural images have much low and little high frequency. Skorokhodov et al. (arXiv 2502.14831) find that latents"
    " with more high frequency are harder to learn for a diffusion model. Latents and images are standardised first."
)
CHANNEL_TEXT = (
    "Constant or redundant channels cost a generator capacity for nothing. Effective rank and participation ratio are"
    " those of the channels' correlations, over all images and positions."
)
NOISE_TEXT = (
    "A generator's latents differ from the encoder's. The slower this curve falls, the more error a decoder tolerates."
)

TOKENIZER_SUMMARY = "Density, symmetries, spectra, channels and robustness of a tokenizer's latents."
DENSITY_SUMMARY = "How evenly a set of latent vectors is distributed."


def write(folder: Path, found: Analysis) -> None:
    """Write `index.html` into an analysis's folder, which must exist."""
    report.write_page(folder / "index.html", make_page(found))


def make_page(found: Analysis) -> report.Html:
    """`index.html` of an analysis, without missing parts."""
    numbers, sections = found.report, []
    if numbers.density is not None and found.embedding is not None:
        sections.append(density_section(numbers, numbers.density, found.embedding))
    if numbers.decoded:
        sections.append(symmetry_section(numbers, found.images))
    if "rgb" in numbers.spectra:
        sections.append(spectrum_section(numbers))
    if numbers.channels is not None:
        sections.append(channel_section(numbers, numbers.channels))
    if numbers.decoded:
        means = number_table(numbers, ["noise_psnr"], over_images(numbers))
        sections.append(report.section("Noise", report.text(NOISE_TEXT), noise_plot(numbers), means))
    caption = "What the numbers depend on. metrics.json in the same folder has every number."
    sections.append(
        report.section("How this was measured", report.table(Table(["what", "value"], flat(numbers.manifest), caption)))
    )
    summary = DENSITY_SUMMARY if numbers.channels is None else TOKENIZER_SUMMARY
    return report.page(found.title, summary, sections)


def over_images(numbers: LatentReport) -> str:
    """Caption of means."""
    return f"Mean over {numbers.decoded_images} images and the 95% interval of that mean."


def number_table(numbers: LatentReport, stems: Sequence[str], caption: str) -> report.Html:
    """A table of the numbers with these stems, with explanations."""
    found = lines(numbers, stems)
    plain = table(found, caption)
    repeated = [i > 0 and line.metric is found[i - 1].metric for i, line in enumerate(found)]
    meanings = ["" if again else line.metric.meaning for line, again in zip(found, repeated)]
    rows = [[*row, text] for row, text in zip(plain.rows, meanings)]
    return report.table(Table([*plain.header, "meaning"], rows, caption))


def density_section(numbers: LatentReport, density: Density, embedding: Embedding) -> report.Html:
    """CV, Gini, entropy, and the embedding."""
    n, draws = len(embedding.points), density.draws
    caption = f"{n:,} points, {draws} draw{'s' * (draws > 1)}; ± is the standard deviation over draws."
    parts = [report.text(DENSITY_TEXT), number_table(numbers, DensityMetrics._fields, caption)]
    if density.floor is not None:
        parts.append(report.text(FLOOR_TEXT))
    return report.section("Density of the latents", *parts, report.columns(*embedding_plots(embedding)))


def embedding_plots(embedding: Embedding) -> list[report.Html]:
    """The points coloured by density and, where there are classes, by class (the paper's figure 5)."""
    relative = embedding.density / embedding.density.mean()
    plots = [shaded_points(embedding.points, relative, "viridis", "Coloured by density; 1 is the mean.")]
    labels = embedding.labels
    if labels is None or labels.max() < 0:
        return plots
    known = np.unique(labels[labels >= 0])
    if len(known) > MANY_CLASSES:
        caption = f"Coloured by class index: {len(known)} classes, so that close ones look alike."
        return [*plots, shaded_points(embedding.points, labels, "turbo", caption)]
    given = dict(enumerate(embedding.classes))
    names = {k: given.get(k, f"class {k}") for k in known.tolist()}
    return [*plots, named_points(embedding.points, labels, names, "Coloured by class.")]


def shaded_points(points: np.ndarray, values: np.ndarray, colormap: str, caption: str) -> report.Html:
    """Points (N, 2), coloured by values."""
    drawing, axes = point_axes()
    drawn = axes.scatter(*points.T, c=values, cmap=colormap, **point_style(len(points)))
    bar = drawing.colorbar(drawn, ax=axes, shrink=0.7)
    bar.ax.tick_params(length=0, labelcolor=report.INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return report.plot(drawing, caption)


def named_points(points: np.ndarray, labels: np.ndarray, names: dict[int, str], caption: str) -> report.Html:
    """Points (N, 2) in their classes' colours, with a legend."""
    from matplotlib import colormaps

    drawing, axes = point_axes()
    for i, (label, name) in enumerate(names.items()):
        chosen = points[labels == label]
        axes.scatter(*chosen.T, color=colormaps["tab20"](i), label=name, **point_style(len(points)))
    drawing.legend(
        loc="outside right upper", frameon=False, labelcolor=report.INK, fontsize=7, handletextpad=0, markerscale=2
    )
    return report.plot(drawing, caption)


def point_axes() -> tuple["Figure", "Axes"]:
    """A square plot without axes: distances in a t-SNE plane have no unit."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5, 4.2), dpi=200, layout="constrained")
    axes = drawing.subplots()
    axes.set_aspect("equal")
    axes.set_axis_off()
    return drawing, axes


def point_style(num: int) -> dict[str, Any]:
    """Small points if there are many, as one bitmap: 10,000 circles would slow the page down."""
    return {"s": float(np.clip(20_000 / num, 1.5, 20)), "linewidths": 0, "rasterized": True}


def symmetry_section(numbers: LatentReport, images: CommutationImages | None) -> report.Html:
    """Commutation and equivariance."""
    stems = ["commutation_error", "commutation_target_mse", "pyramid_error", "pyramid_target_mse"]
    parts = [report.text(COMMUTATION_TEXT)]
    if lines(numbers, stems):
        parts.append(number_table(numbers, stems, f"{over_images(numbers)} Scales by the height of their pictures."))
    parts += [commutation_pictures(images)] if images is not None else []
    stems = ["reconstruction_rms", "equivariance_decoder", "equivariance_encoder"]
    return report.section("Scales and symmetries", *parts, number_table(numbers, stems, over_images(numbers)))


def commutation_pictures(images: CommutationImages) -> report.Html:
    """Decoded reduced latents above reduced decoded images."""
    coarse, full = images.coarse, images.full
    pooled = [area_resize(full, x.shape[-2:]) for x in coarse]
    rows = []
    for i, name in enumerate(images.names):
        for title, stacks, last in (("D(T z)", coarse, full), ("T D(z)", pooled, images.originals)):
            rows.append(report.Row(name, [to_pil(stack[i]) for stack in (*stacks, last)], title))
    titles = [*(f"{x.shape[-2]} px" for x in coarse), "D(z); original"]
    caption = (
        "Above: the latent map reduced, then decoded. Below: decoded, then reduced. They are equal if decoding"
        " commutes with reducing. Last column: the reconstruction above the original."
    )
    return report.picture_grid(titles, rows, caption)


def spectrum_section(numbers: LatentReport) -> report.Html:
    """Cosine coefficients and power over frequency."""
    parts = [report.text(SPECTRUM_TEXT)]
    plots = []
    latent = numbers.spectra.get("latent")
    if latent is not None and latent.dct:
        curves = [
            report.Line(what, list(range(1, len(latent.dct))), decades(numbers.spectra[maps].dct[1:]))
            for what, maps in SPECTRA.items()
        ]
        plots.append(
            report.line_plot(
                curves,
                "position in zigzag order",
                "log10 of mean |coefficient| / DC",
                "Cosine transform of 8 x 8 blocks, low frequencies to the left.",
            )
        )
    else:
        parts.append(report.text("The latent map is smaller than 8 x 8: it has no blockwise cosine transform."))
    names = [f"{maps}_{name}" for name in ("high_frequency_share", "power_slope") for maps in SPECTRA.values()]
    return report.section("Frequencies", *parts, *plots, number_table(numbers, names, over_images(numbers)))


def decades(values: Sequence[Estimate]) -> list[float]:
    """Decimal logarithms of means, clamped at a millionth."""
    return np.log10(np.maximum([value.mean for value in values], 1e-6)).tolist()


def channel_section(numbers: LatentReport, channels: Channels) -> report.Html:
    """Rank, dead channels, nats."""
    names = ["effective_rank", "participation_ratio", "active_channels", "dead_channels", "kl"]
    caption = f"{numbers.n:,} images, {numbers.latent_channels} channels."
    plots = [channel_plot(channels.channel_std, "standard deviation of the mean", "How much each channel varies.")]
    if channels.channel_kl:
        nats = [value.mean for value in channels.channel_kl]
        plots.append(channel_plot(nats, "nats per image", "KL divergence of each channel."))
    return report.section(
        "Channels", report.text(CHANNEL_TEXT), number_table(numbers, names, caption), report.columns(*plots)
    )


def channel_plot(values: Sequence[float], label: str, caption: str) -> report.Html:
    """One number per channel, in descending order."""
    ordered = sorted(values, reverse=True)
    line = report.Line(label, list(range(1, len(ordered) + 1)), ordered)
    return report.line_plot([line], "channels, sorted", label, caption)


def noise_plot(numbers: LatentReport) -> report.Html:
    """PSNR over sigma."""
    curve = {float(sigma): psnr.mean for sigma, psnr in numbers.of("noise_psnr").items()}
    line = report.Line("PSNR", list(curve), list(curve.values()))
    caption = f"Mean PSNR of D(z + sigma eps) over {numbers.decoded_images} images; sigma in standard deviations."
    return report.line_plot([line], "sigma", "PSNR (dB)", caption)
